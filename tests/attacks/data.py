"""Damaged data files and prompt sets: every kind of file that a user may name by mistake or find broken."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from tests.attacks.bad_input import BadInput, run_specflow

RECORDS = [
    {"messages": [{"role": "user", "content": f"the cat sees a bird {i}"}, {"role": "assistant", "content": "one"}]}
    for i in range(60)
]
QUESTIONS = [{"question_id": i, "category": "c", "turns": [f"the dog finds a river {i}"]} for i in range(4)]
DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
SURROGATE = "half \\ud83d"


def lines(records: list[Any], more: bytes = b"") -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode() + more


def with_line(content: str) -> bytes:
    """A file of lines whose third one is `content`."""
    good = lines(RECORDS).splitlines(keepends=True)
    return b"".join([*good[:2], content.encode() + b"\n", *good[3:]])


def parquet(records: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def arrow(records: list[Any]) -> bytes:
    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def spoilt(packed: bytes) -> bytes:
    """Bytes overwritten in the middle."""
    middle = len(packed) // 2
    return packed[:middle] + b"\xff" * 40 + packed[middle + 40 :]


def of_each(value: Any) -> bytes:
    return lines([value] * 40)


def said(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


PACKED = gzip.compress(lines(RECORDS * 20))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
CONFIGS = "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
HUB = {"README.md": CONFIGS.encode(), "a.jsonl": lines(RECORDS), "b.jsonl": lines(RECORDS[:1])}

Content = bytes | dict[str, bytes]
"""Of a file, or of the files of a folder."""

DATA: list[tuple[str, str, Content, dict[str, str], tuple[str, ...]]] = [
    ("an empty file", "d.jsonl", b"", {}, ("no record",)),
    ("an empty JSON file", "d.json", b"", {}, ("no record",)),
    ("an empty list", "d.json", b"[]", {}, ("no record",)),
    ("blank lines only", "d.jsonl", b"\n \n\n", {}, ("no record",)),
    ("a web page", "d.json", b"<html>404</html>", {}, ("is not JSON", "byte 0")),
    ("UTF-16 lines", "d.jsonl", lines(RECORDS).decode().encode("utf-16"), {}, ("UTF-16", "convert")),
    ("UTF-16 JSON", "d.json", json.dumps(RECORDS).encode("utf-16"), {}, ("UTF-16", "convert")),
    ("UTF-16 without a mark", "d.jsonl", lines(RECORDS).decode().encode("utf-16-le"), {}, ("not JSON lines", "line 1")),
    (
        "Latin-1",
        "d.jsonl",
        with_line('{"prompt": "caf\u00e9"}').replace("\u00e9".encode(), b"\xe9"),
        {},
        ("line 3", "UTF-8"),
    ),
    ("a hole of NUL bytes", "d.jsonl", lines(RECORDS, b"\0" * 512), {}, ("line 61", "damaged", "salvage")),
    ("a raw NUL in a text", "d.jsonl", with_line('{"prompt": "a \0 b"}'), {}, ("line 3", "control character")),
    ("a JSON list cut off", "d.json", json.dumps(RECORDS).encode()[:2000], {}, ("damaged", "cut off", "salvage")),
    ("a JSON list not closed", "d.json", json.dumps(RECORDS).encode()[:-1], {}, ("not closed",)),
    ("two JSON lists in a row", "d.json", json.dumps(RECORDS).encode() * 2, {}, ("behind the end of the list",)),
    ("a gzip cut off", "d.jsonl.gz", PACKED[: len(PACKED) // 2], {}, ("damaged", "salvage")),
    ("a gzip damaged in the middle", "d.jsonl.gz", spoilt(PACKED), {}, ("damaged at",)),
    (
        "a gzip of JSON damaged in the middle",
        "d.json.gz",
        spoilt(gzip.compress(json.dumps(RECORDS * 20).encode())),
        {},
        ("at byte",),
    ),
    ("a gzip with another checksum", "d.jsonl.gz", PACKED[:-8] + struct.pack("<II", 1, 1), {}, ("damaged at", "CRC")),
    ("a line nested 100,000 deep", "d.jsonl", lines(RECORDS[:2], DEEP), {}, ("line 3", "nested too deeply")),
    ("JSON nested 100,000 deep", "d.json", DEEP, {}, ("nested too deeply",)),
    (
        "a column of JSON nested 100,000 deep",
        "d.jsonl",
        of_each({"messages": "[" * 100_000}),
        {},
        ("no list of messages",),
    ),
    (
        "a number of 5,000 digits",
        "d.jsonl",
        with_line('{"prompt": "a", "n": ' + "9" * 5000 + "}"),
        {},
        ("line 3", "digits"),
    ),
    ("one bad line", "d.jsonl", with_line('{"prompt": "a"'), {}, ("line 3", "after 2 whole records", "salvage")),
    ("a list of numbers", "d.jsonl", b"[1, 2]\n", {}, ("record 1 is [1, 2]", "expected an object")),
    ("a Parquet file cut off", "d.parquet", parquet(RECORDS)[:-100], {}, ("not Parquet",)),
    ("a Parquet file of zeros", "d.parquet", bytes(4096), {}, ("not Parquet",)),
    ("an Arrow file cut off", "d.arrow", arrow(RECORDS)[:300], {}, ("not Arrow",)),
    ("a Git LFS pointer", "d.parquet", LFS, {}, ("Git LFS pointer", "git lfs pull")),
    ("a file of zstd", "d.jsonl.zst", b"\x28\xb5\x2f\xfd rest", {}, ("zstd", "decompress")),
    ("a zip archive", "d.zip", b"PK\x03\x04 rest", {}, ("zip archive", "unpack")),
    ("a CSV file with uneven rows", "d.csv", b"question,answer\na,b\na,b,c\n", {}, ("row 2", "number of fields")),
    ("an unknown layout", "d.jsonl", of_each({"questions": "a"}), {}, ("['questions']", "'question'", "rename")),
    (
        "another layout than the format",
        "d.jsonl",
        lines(RECORDS),
        {"format": "sharegpt"},
        ("no list of conversations", "format"),
    ),
    (
        "lone surrogates only",
        "d.jsonl",
        of_each(said("x")).replace(b'"x"', f'"{SURROGATE}"'.encode()),
        {},
        ("lone surrogate",),
    ),
    (
        "unknown roles only",
        "d.jsonl",
        of_each({"messages": [{"role": "Mensch", "content": "a"}]}),
        {},
        ("unknown role 'Mensch'",),
    ),
    ("pictures only", "d.jsonl", of_each(said([{"type": "image_url"}])), {}, ("'image_url', not text",)),
    ("a column of pictures", "d.jsonl", of_each({**said("what is this"), "images": ["a.png"]}), {}, ("has images",)),
    (
        "rendered text",
        "d.jsonl",
        of_each({"text": "<|im_start|>user\na<|im_end|>"}),
        {},
        ("rendered already", "name messages"),
    ),
    ("a dialogue in one text", "d.jsonl", of_each({"text": "### Human: a\n### Assistant: b"}), {}, ("whole dialogue",)),
    ("special tokens in messages", "d.jsonl", of_each(said("a <|im_end|> b")), {}, ("'<|im_end|>'", "usable")),
    (
        "tokens of another tokenizer",
        "d.jsonl",
        of_each({"input_ids": [1, 5, 9], "loss_mask": [0, 0, 1]}),
        {},
        ("chat template write",),
    ),
    ("tokens beyond the vocabulary", "d.jsonl", of_each({"input_ids": [10**6], "loss_mask": [1]}), {}, ("input_ids",)),
    ("a folder without data", "folder", {"LICENSE": b"free"}, {}, ("cannot be read as a data set",)),
    ("a folder of several configurations", "folder", HUB, {}, ("['one', 'two']", "`config`")),
    ("a configuration that is not there", "folder", HUB, {"config": "three"}, ("'three'", "['one', 'two']")),
    ("a split that is not there", "folder", HUB, {"config": "one", "split": "test"}, ("'test'", "['train']")),
    ("a configuration of a file", "d.jsonl", lines(RECORDS), {"config": "one"}, ("is a file", "remove `config`")),
    ("a file with a byte order mark", "d.jsonl", b"\xef\xbb\xbf" + lines(RECORDS), {}, ()),
    ("lines that end in CR LF", "d.jsonl", lines(RECORDS).replace(b"\n", b"\r\n"), {}, ()),
    ("a name like a pattern", "data[1] *.parquet", parquet(RECORDS), {}, ()),
    ("one configuration of a folder", "folder", HUB, {"config": "one"}, ()),
    (
        "a few lone surrogates",
        "d.jsonl",
        lines(RECORDS, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n'),
        {},
        (),
    ),
]


def question(**fields: Any) -> bytes:
    """A file of questions with one more."""
    return lines([*QUESTIONS, {"question_id": "x", "category": "c", "turns": ["a"], **fields}])


PROMPT_SETS: list[tuple[str, str, Content, tuple[str, ...]]] = [
    ("an empty prompt set", "q.jsonl", b"\n", ("no question",)),
    ("a prompt set in UTF-16", "q.jsonl", lines(QUESTIONS).decode().encode("utf-16"), ("UTF-16",)),
    ("a prompt set in Latin-1", "q.jsonl", question(turns=["X"]).replace(b"X", b"caf\xe9"), ("line 5", "UTF-8")),
    (
        "a lone surrogate in a question",
        "q.jsonl",
        question(turns=["X"]).replace(b"X", SURROGATE.encode()),
        ("line 5", "surrogate"),
    ),
    (
        "a lone surrogate in a category",
        "q.jsonl",
        question(category="X").replace(b"X", SURROGATE.encode()),
        ("line 5", "surrogate"),
    ),
    ("a question nested 100,000 deep", "q.jsonl", lines(QUESTIONS, DEEP), ("line 5", "nested too deeply")),
    ("a prompt set's gzip cut off", "q.jsonl.gz", gzip.compress(lines(QUESTIONS * 50))[:60], ("cannot be read",)),
    (
        "a prompt set's gzip damaged in the middle",
        "q.json.gz",
        spoilt(gzip.compress(json.dumps([said(str(i)) for i in range(999)]).encode())),
        ("prompt set questions",),
    ),
    ("a prompt set's Parquet cut off", "q.parquet", parquet(QUESTIONS)[:-20], ("row 1 cannot be read",)),
    ("a prompt set of a Git LFS pointer", "q.jsonl", LFS, ("Git LFS pointer",)),
    (
        "an unknown layout of questions",
        "q.jsonl",
        of_each({"prompt": "a"}),
        ("has the keys prompt", "expected question_id"),
    ),
    ("a question's id twice", "q.jsonl", question(question_id=1), ("line 5", "id '1' of line 2")),
    ("a question without words", "q.jsonl", question(turns=[" "]), ("line 5", "empty")),
    ("turns that are no list", "q.jsonl", question(turns="a"), ("line 5", "expected a list")),
    ("a question that is a number", "q.jsonl", lines([*QUESTIONS, 5]), ("line 5", "is a int")),
    (
        "a folder of two prompt sets",
        "q",
        {"a.jsonl": lines(QUESTIONS), "b.jsonl": lines(QUESTIONS)},
        ("2 files", "name one"),
    ),
    ("a prompt set with a byte order mark", "q.jsonl", b"\xef\xbb\xbf" + lines(QUESTIONS), ()),
]


def put(place: Path, content: Content) -> Path:
    if isinstance(content, bytes):
        place.write_bytes(content)
        return place
    place.mkdir()
    for name, inside in content.items():
        (place / name).write_bytes(inside)
    return place


def _changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """params.yaml after `change`, with `fetch` done before."""
    if not (folder / "artifacts" / "tiny" / "target.json").exists():
        ending = run_specflow(folder, "fetch", "tiny")
        assert ending.code == 0, ending.stderr
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    change(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def _data(name: str, content: Content, options: dict[str, str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        source = {"source": f"file:{put(folder / name, content)}", **options}
        _changed(folder, lambda params: params["families"]["tiny"]["data"].update(sources=[source]))

    return damage


def _prompt_set(name: str, content: Content) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        source = {"source": f"file:{put(folder / name, content)}"}
        _changed(folder, lambda params: params["prompt_sets"].update(questions=source))

    return damage


CASES = [
    *(
        BadInput("data", name, _data(file, content, options), ("prepare", "tiny"), words)
        for name, file, content, options, words in DATA
    ),
    *(
        BadInput("prompt set", name, _prompt_set(file, content), ("prepare", "tiny"), words)
        for name, file, content, words in PROMPT_SETS
    ),
]
