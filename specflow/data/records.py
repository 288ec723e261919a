"""Objects out of .json (array, single object or objects in a row), .jsonl, either gzipped, .parquet and data
set folders.

Text is streamed with exact byte offsets, so that a file which breaks off says where, and how much is lost.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from specflow.errors import UserError
from specflow.sources import open_binary

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Damage:
    """Where a file stops being readable and what lies beyond."""

    where: str
    reason: str
    records_read: int
    bytes_lost: int


class _Report(Protocol):
    damage: Damage | None


class _Broken(Exception):
    """Unreadable from `offset` on (bytes after decompression); `where` as the user is told."""

    def __init__(self, where: str, reason: str, offset: int) -> None:
        super().__init__(where, reason, offset)
        self.where, self.reason, self.offset = where, reason, offset


def read_records(path: Path, *, split: str, salvage: bool, report: _Report) -> Iterator[dict[str, Any]]:
    """Objects of a file or data set folder. Damage is a UserError; with `salvage` it is reported instead."""
    if path.is_dir() or path.suffix == ".parquet":
        yield from _read_data_set(path, split)
        return
    is_lines = ".jsonl" in path.suffixes
    count = 0
    try:
        with open_binary(path) as stream:
            for value in _read_lines(stream) if is_lines else _read_json(stream):
                if not isinstance(value, dict):
                    raise UserError(
                        f"{path} record {count + 1} is {json.dumps(value)[:40]}, expected an object: convert it"
                    )
                count += 1
                yield value
    except _Broken as broken:
        if not count:
            kind = "JSON lines" if is_lines else "JSON"
            raise UserError(
                f"{path} is not {kind} ({broken.reason} at {broken.where}): name another file, or convert it"
            ) from None
        if not salvage:
            raise UserError(
                f"{path} is damaged at {broken.where} ({broken.reason}) after {count} whole records: "
                "fetch it again, or set `on_damage: salvage` to keep these"
            ) from None
        report.damage = Damage(broken.where, broken.reason, count, _length(path, broken.offset) - broken.offset)


def _length(path: Path, known: int) -> int:
    """Bytes that can be read of a file, decompressed."""
    length = 0
    with open_binary(path) as stream:
        if not isinstance(stream, gzip.GzipFile):
            return path.stat().st_size
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                length += len(chunk)
        except (EOFError, OSError):
            pass  # cut off as well: what came out so far is all there is
    return max(length, known)


def _read_data_set(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file or of a split of a data set folder (a hub snapshot), through `datasets`."""
    import datasets

    try:
        if path.is_dir():
            rows = datasets.load_dataset(str(path), split=split, streaming=True)
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from rows
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read as a data set ({reason}): check the file and the source's split"
        ) from None


def _read_lines(stream: BinaryIO) -> Iterator[Any]:
    """One JSON value a line."""
    offset = 0
    try:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise _Broken(f"line {number}", str(error), offset) from None
            offset += len(line)
    except (EOFError, OSError) as error:
        raise _Broken(f"byte {offset:,}", str(error), offset) from None


def _read_json(stream: BinaryIO) -> Iterator[Any]:
    """Values of a top-level array, or one after another; an object that only wraps a list is opened."""
    text = _Window(stream)
    is_array = text.peek() == "["
    if is_array:
        text.skip(1)
    count = 0
    while (character := text.peek()) not in ("", "]"):
        if character != "{":
            raise _Broken(f"byte {text.offset():,}", f"{character!r} where an object should begin", text.offset())
        value = text.value()
        count += 1
        if count == 1 and not is_array and text.peek() == "" and (inner := _wrapped(value)) is not None:
            yield from inner
            return
        yield value
        if text.peek() == ",":
            text.skip(1)
    if is_array and text.peek() == "":
        raise _Broken(f"byte {text.offset():,}", "the list is not closed", text.offset())
    if not count:
        raise _Broken(f"byte {text.offset():,}", "no record", text.offset())


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
            raise _Broken(f"byte {start:,} or later", f"not UTF-8 ({error.reason})", start) from None
        except (EOFError, OSError) as error:
            raise _Broken(f"byte {start:,}", str(error), start) from None

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
            except json.JSONDecodeError as error:
                # A value cut by the window's edge fails there, or as a string without an end: read on.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if self._ended or not cut:
                    what = "the record that begins there is cut off" if cut else f"{error.msg} in that record"
                    raise _Broken(f"byte {self.offset():,}", what, self.offset()) from None
            self._refill()
