"""Files that are whole or absent, and row logs that survive a kill."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specflow import files
from specflow.errors import UserError


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_the_old_output(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"

    def write(text: str, fail: bool) -> None:
        with files.atomic_path(target) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "part" if folder else temporary).write_text(text)
            if fail:
                raise RuntimeError

    write("old", fail=False)
    with pytest.raises(RuntimeError):
        write("new", fail=True)
    assert (target / "part" if folder else target).read_text() == "old"
    write("new", fail=False)
    assert (target / "part" if folder else target).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_round_trip_and_digest(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "\u00e9\u4e2d"}
    files.write_json(tmp_path / "deep" / "x.json", value)
    assert files.read_json(tmp_path / "deep" / "x.json", what="x", made_by="y") == value
    assert files.sha256_json({"a": 1, "b": 2}) == files.sha256_json({"b": 2, "a": 1}) != files.sha256_json({"a": 1})


def test_missing_and_damaged_files_name_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"facts .* is missing: run `specflow fetch tiny` first"):
        files.read_json(file, what="facts", made_by="specflow fetch tiny")
    file.write_text("{")
    with pytest.raises(UserError, match=r"is not valid JSON .* run `specflow fetch tiny` again"):
        files.read_json(file, what="facts", made_by="specflow fetch tiny")
    file.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        files.read_jsonl(file)


def test_jsonl_round_trip_with_line_separators(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\nc"}, {"text": ""}]
    assert files.write_jsonl(tmp_path / "x.jsonl", rows) == 2
    assert files.read_jsonl(tmp_path / "x.jsonl") == rows


def test_row_log_resumes_and_drops_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = files.RowLog(file, "key")
    log.append({"id": "a", "n": 1})
    log.append({"id": "b", "n": 2})
    log.close()
    with file.open("a") as stream:
        stream.write('{"id": "c", "n"')
    resumed = files.RowLog(file, "key")
    assert list(resumed.rows) == ["a", "b"]
    resumed.append({"id": "c", "n": 3})
    resumed.close()
    assert [row["n"] for row in files.RowLog(file, "key").rows.values()] == [1, 2, 3]


def test_row_log_of_another_key_is_discarded(tmp_path: Path) -> None:
    log = files.RowLog(tmp_path / "log.jsonl", "one")
    log.append({"id": "a"})
    log.close()
    other = files.RowLog(tmp_path / "log.jsonl", "two")
    assert other.rows == {}
    other.close(delete=True)
    assert not (tmp_path / "log.jsonl").exists()


def test_row_log_after_kill_9(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    program = (
        "import sys; from pathlib import Path; from specflow.files import RowLog\n"
        "log = RowLog(Path(sys.argv[1]), 'key')\n"
        "for i in range(10**6): log.append({'id': str(i), 'text': 'x' * 500})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(file)])
    deadline = time.monotonic() + 20
    while (not file.exists() or file.stat().st_size < 100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = file.read_bytes().count(b"\n") - 1
    log = files.RowLog(file, "key")
    assert list(log.rows) == [str(i) for i in range(written)] and written > 100
    log.close()


def test_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = files.digest_of(file, tmp_path / "cache")
    hashed: list[Path] = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or real(path))
    assert files.digest_of(file, tmp_path / "cache") == first
    assert hashed == []
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(
        file, ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # as `cp -p` and `rsync -t` leave it: same size, same time
    assert files.digest_of(file, tmp_path / "cache") == hashlib.sha256(b"two").hexdigest()
    assert hashed == [file]
