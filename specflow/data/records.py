"""Objects out of .json (array, single object or objects in a row), .jsonl and .csv, also gzipped, .parquet and .arrow.

Each file is read with its own schema: nothing is recast to fit another file of the data set. JSON is streamed with
exact byte offsets, so that a file which breaks off says where, and how much is lost.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from specflow.data.folders import data_files
from specflow.errors import UserError
from specflow.sources import open_binary

_CHUNK_BYTES = 2**20
_UNREADABLE = (EOFError, OSError, zlib.error)
"""What reading a file raises that is cut off or damaged, in the middle of its gzip too."""
_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, and only gzip is read: decompress it",
    b"\xfd7zXZ": "compressed with xz, and only gzip is read: decompress it",
    b"BZh": "compressed with bzip2, and only gzip is read: decompress it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xfe": "text in UTF-16, expected UTF-8: convert it (`iconv -f UTF-16 -t UTF-8`)",
    b"\xfe\xff": "text in UTF-16, expected UTF-8: convert it (`iconv -f UTF-16 -t UTF-8`)",
}
"""First bytes of what is named wrongly, and what to say."""


@dataclass(frozen=True)
class Damage:
    """Where a file stops being readable and what lies beyond; of several files, the places and the sums."""

    where: str
    reason: str
    records_read: int
    bytes_lost: int


class _Report(Protocol):
    damage: Damage | None
    files_not_read: list[str]


class Broken(Exception):
    """Unreadable from `offset` on (bytes after decompression; None where a format does not say); `where` as the user
    is told.
    """

    def __init__(self, where: str, reason: str, offset: int | None = None) -> None:
        super().__init__(where, reason, offset)
        self.where, self.reason, self.offset = where, reason, offset


def read_records(
    path: Path, *, split: str, config: str | None, salvage: bool, report: _Report
) -> Iterator[dict[str, Any]]:
    """Objects of a file or data set folder. Damage is a UserError; with `salvage` it is reported instead."""
    if path.is_dir():
        files, report.files_not_read = data_files(path, config, split)
    elif config is not None:
        raise UserError(f"{path} is a file and has no configuration {config!r}: remove `config` from this source")
    else:
        files = [path]
    for file in files:
        yield from _objects(file, salvage, report)


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place as the user counts it, value) of each record; "line 3" of lines, "record 3" of JSON, "row 3" of tables.

    Raises Broken for damage, UserError for what is no data file at all.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is no regular file: name a file or a folder")
        with path.open("rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    if what := next((what for signature, what in _SIGNATURES.items() if start.startswith(signature)), None):
        raise UserError(f"{path} is {what}")
    suffixes = path.suffixes
    if path.suffix in (".parquet", ".arrow"):
        yield from _read_table(path)
    else:
        with open_binary(path) as stream:
            if ".csv" in suffixes or ".tsv" in suffixes:
                yield from _read_csv(stream, "\t" if ".tsv" in suffixes else ",")
            else:
                yield from _read_lines(stream) if ".jsonl" in suffixes else _read_json(stream)


def _objects(path: Path, salvage: bool, report: _Report) -> Iterator[dict[str, Any]]:
    count = 0
    try:
        for _, value in read_values(path):
            if not isinstance(value, dict):
                raise UserError(
                    f"{path} record {count + 1} is {json.dumps(value, default=str)[:40]}, expected an object: "
                    "convert the file"
                )
            count += 1
            yield value
    except Broken as broken:
        if not count:
            raise UserError(
                f"{path} is not {_kind(path)} ({broken.reason} at {broken.where}): name another file, or convert it"
            ) from None
        if broken.offset is None or not salvage:
            cure = "" if broken.offset is None else ", or set `on_damage: salvage` to keep these"
            raise UserError(
                f"{path} is damaged at {broken.where} ({broken.reason}) after {count} whole records: "
                f"fetch it again{cure}"
            ) from None
        lost = _length(path, broken.offset) - broken.offset
        report.damage = _with(report.damage, Damage(f"{path.name} {broken.where}", broken.reason, count, lost))


def _with(before: Damage | None, new: Damage) -> Damage:
    if before is None:
        return new
    return Damage(
        f"{before.where}; {new.where}",
        f"{before.reason}; {new.reason}",
        before.records_read + new.records_read,
        before.bytes_lost + new.bytes_lost,
    )


def _kind(path: Path) -> str:
    if ".jsonl" in path.suffixes:
        return "JSON lines"
    return {".parquet": "Parquet", ".arrow": "Arrow", ".csv": "CSV", ".tsv": "TSV"}.get(path.suffix, "JSON")


def _length(path: Path, known: int) -> int:
    """Bytes that can be read of a file, decompressed."""
    length = 0
    with open_binary(path) as stream:
        if not isinstance(stream, gzip.GzipFile):
            return path.stat().st_size
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                length += len(chunk)
        except _UNREADABLE:
            pass  # cut off as well: what came out so far is all there is
    return max(length, known)


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet or Arrow file."""
    import pyarrow.parquet

    number = 0
    try:
        with path.open("rb") as stream:
            is_arrow = path.suffix == ".arrow"
            batches = (
                pyarrow.ipc.open_stream(stream) if is_arrow else pyarrow.parquet.ParquetFile(stream).iter_batches()
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Broken(f"row {number + 1}", _one_line(error)) from None


def _read_csv(stream: BinaryIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a field may hold a whole conversation
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(csv.DictReader(text, delimiter=delimiter, strict=True), 1):
                if None in row or None in row.values():
                    raise Broken(f"row {number}", "another number of fields than the first row")
                yield f"row {number}", row
    except (*_UNREADABLE, csv.Error, UnicodeDecodeError) as error:
        raise Broken(f"row {number + 1}", _one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for any text that is none that can be used."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_lines(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """One JSON value a line."""
    offset = 0
    try:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise Broken(f"line {number}", f"not UTF-8: {error.reason}", offset) from None
                except json.JSONDecodeError as error:
                    raise Broken(f"line {number}", error.msg, offset) from None
                except ValueError as error:
                    raise Broken(f"line {number}", str(error), offset) from None
                yield f"line {number}", value
            offset += len(line)
    except _UNREADABLE as error:
        raise Broken(f"byte {offset:,}", _one_line(error), offset) from None


def _read_json(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Values of a top-level array, or one after another; an object that only wraps a list is opened."""
    text = _Window(stream)
    is_array = text.peek() == "["
    if is_array:
        text.skip(1)
    count = 0
    while (character := text.peek()) != "" and not (is_array and character == "]"):
        if character != "{":
            raise Broken(text.where(), f"{character!r} where an object should begin", text.offset())
        value = text.value()
        count += 1
        if count == 1 and not is_array and text.peek() == "" and (inner := _wrapped(value)) is not None:
            yield from ((f"record {number}", record) for number, record in enumerate(inner, 1))
            return
        yield f"record {count}", value
        if text.peek() == ",":
            text.skip(1)
    if is_array:
        if text.peek() == "":
            raise Broken(text.where(), "the list is not closed", text.offset())
        text.skip(1)
        if behind := text.peek():
            raise Broken(text.where(), f"{behind!r} behind the end of the list", text.offset())


def _wrapped(value: dict[str, Any]) -> list[Any] | None:
    """The list of records in {"data": [...], ...}; None where the object is a record itself."""
    lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    return lists[0] if len(lists) == 1 and not {"conversations", "messages"} & value.keys() else None


class _Window:
    """The part of a text file around the place of reading, refilled as values are taken from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decode = stream, codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._position, self._start, self._ended = "", 0, 0, False

    def offset(self) -> int:
        """Bytes before the place of reading."""
        return self._start + len(self._text[: self._position].encode("utf-8"))

    def where(self) -> str:
        return f"byte {self.offset():,}"

    def _refill(self) -> None:
        """Read as much again as is held, so that scanning a long value anew stays linear."""
        start = self.offset()
        self._text, self._position = self._text[self._position :], 0
        self._start = start
        try:
            data = self._stream.read(max(_CHUNK_BYTES, len(self._text)))
            self._ended = not data
            self._text += self._decode(data, final=False)
        except UnicodeDecodeError as error:
            raise Broken(f"byte {start:,} or later", f"not UTF-8: {error.reason}", start) from None
        except _UNREADABLE as error:
            raise Broken(f"byte {start:,}", _one_line(error), start) from None

    def peek(self) -> str:
        """Next character that is not white space, "" at the end of the file."""
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self._position += 1
            if self._ended:
                return ""
            self._refill()

    def skip(self, count: int) -> None:
        self._position += count

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, self._position = self._scan(self._text, self._position)
                return value
            except RecursionError:
                raise Broken(self.where(), "nested too deeply", self.offset()) from None
            except json.JSONDecodeError as error:
                # A value cut by the window's edge fails there, or as a string without an end: read on.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if self._ended or not cut:
                    what = "the record that begins there is cut off" if cut else f"{error.msg} in that record"
                    raise Broken(self.where(), what, self.offset()) from None
            except ValueError as error:  # a number of thousands of digits
                raise Broken(self.where(), str(error), self.offset()) from None
            self._refill()
