"""Files that are whole or absent: atomic writes, append-only row files that survive a kill, digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any

from specflow.errors import UserError

KEPT_S = 7 * 24 * 3600.0
"""How long what a killed process left is kept where nobody can tell any more whether it is needed."""
_TEMPORARY = re.compile(r"\..+\.(.+)-(\d+)\.tmp")
"""Names of `atomic_path`; nodes may share the folder."""


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON-able value, independent of key order and white space."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered in `cache` until its size or one of its times (of content, of inode) changes.

    Raises UserError where it is no file, such as a pipe, which would be waited for.
    """
    path, stat = path.resolve(), path.stat()
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{path} is no regular file: name a file or a folder")
    known = cache / "digests" / f"{sha256_bytes(str(path).encode())[:32]}.json"
    stamp = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    if known.exists():
        entry = json.loads(known.read_text(encoding="utf-8"))
        if {key: entry.get(key) for key in stamp} == stamp:
            return str(entry["sha256"])
    digest = sha256_file(path)
    write_json(known, {**stamp, "sha256": digest})
    return digest


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (a file or folder to create) that takes its name only on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)  # a folder cannot be replaced by rename; a kill here leaves nothing half-written
        temporary.replace(path)
    finally:
        remove(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of unfinished files and folders below `folder`.

    Of this machine where no process of that number was there when it was written; of others, which may be at work on a
    shared file system, after KEPT_S.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if (match := _TEMPORARY.fullmatch(name)) and _left_behind(Path(place) / name, match[0], int(match[2])):
                remove(Path(place) / name)


def _left_behind(temporary: Path, name: str, pid: int) -> bool:
    import psutil

    try:
        written = temporary.stat().st_mtime
        if not name.endswith(f".{platform.node()}-{pid}.tmp"):
            return time.time() - written > KEPT_S
        return bool(psutil.Process(pid).create_time() > written)  # the number was given to another process since
    except psutil.NoSuchProcess:
        return True
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path, *, what: str, made_by: str) -> Any:
    """Read a JSON file that an earlier stage made; a missing or damaged file is a UserError naming that stage."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing: run `{made_by}` first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}): delete it and run `{made_by}` again") from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, atomically; return the number of rows."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, *, what: str = "file", made_by: str | None = None) -> list[Any]:
    """Read one JSON value a line. Raises UserError with the line number where a line is not JSON."""
    fix = f": run `{made_by}` first" if made_by else ": check the path"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing{fix}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{what} {path} line {number} is not JSON ({error.msg}): mend or remove that line"
            ) from None
    return rows


def read_rows(path: Path, key: str) -> dict[str, Any] | None:
    """Finished rows by id of a `RowLog` file, which another process may be writing; None of another key."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if not lines:
        return {}
    if json.loads(lines[0]) != {"key": key}:
        return None
    return {row["id"]: row for row in map(json.loads, lines[1:])}


class RowLog:
    """Append-only jsonl of finished rows keyed by `id`: what a killed stage had finished is still there.

    A row is flushed line by line; a last line cut off by a kill is dropped on the next start. `key` is stored in the
    first line, and a log written under another key is discarded: its rows answer another question.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = read_rows(path, key)
        self.rows, self.discarded = found or {}, found is None
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for value in [{"key": key}, *self.rows.values()]:
                stream.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._stream = path.open("a", encoding="utf-8")

    def append(self, row: Any) -> None:
        self.rows[row["id"]] = row
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self, *, delete: bool = False) -> None:
        self._stream.close()
        if delete:
            self.path.unlink(missing_ok=True)
