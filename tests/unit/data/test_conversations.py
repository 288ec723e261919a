"""Readers: every layout to the same conversation, what is dropped is counted, damage is told exactly."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specflow.config import DataSource
from specflow.data import records
from specflow.data.conversations import Conversation, SourceReport, normalise, read_conversations
from specflow.errors import UserError

EXPECTED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(path: Path, **options: Any) -> tuple[list[Conversation], SourceReport]:
    report = SourceReport("test")
    source = DataSource(source=f"file:{path}", **options)
    return list(read_conversations(source, path, report)), report


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"conversations": [{"from": "human", "value": " hi "}, {"from": "gpt", "value": "hello\n"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": "hi"}, {"role": "bard", "content": "hello"}]}, "sharegpt"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *EXPECTED[1:]]},
            "messages",
        ),
        ({"prompt": "hi", "prompt_id": "1", "data": ["hi", "hello"]}, "ultrachat"),
        ({"prompt": "hi", "prompt_id": "1", "messages": EXPECTED}, "messages"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
    ],
)
def test_every_layout_gives_the_same_conversation(tmp_path: Path, record: dict[str, Any], layout: str) -> None:
    conversations, report = read(write(tmp_path / "data.jsonl", [record]))
    assert [conversation.messages for conversation in conversations] == [EXPECTED]
    assert (report.layout, report.records, report.conversations) == (layout, 1, 1)


def test_plain_prompts_and_turns(tmp_path: Path) -> None:
    for record in ({"prompt": "hi"}, {"text": "hi"}, {"turns": ["hi"]}):
        assert read(write(tmp_path / "data.jsonl", [record]))[0][0].messages == EXPECTED[:1]
    (conversation,), _ = read(write(tmp_path / "data.jsonl", [{"turns": ["one", "two"]}]))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "user"]
    assert conversation.messages[1]["content"] == ""  # the target's to give
    assert conversation.user_turns == ["one", "two"]


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    (conversation,), _ = read(write(tmp_path / "d.jsonl", [{"instruction": "sum", "input": "1 2", "output": "3"}]))
    assert conversation.user_turns == ["sum\n\n1 2"]


def test_normalise_rules_are_counted() -> None:
    dropped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    turns = [
        ("developer", "be kind"),
        ("human", "a"),
        ("chatgpt", " b\n"),
        ("user", "c"),
        ("narrator", "!"),
        ("gpt", "d"),
    ]
    messages = normalise([{"from": role, "value": text} for role, text in turns], dropped, unused)
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "be kind"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert dropped == {"cut at unknown role 'narrator'": 2}  # its neighbours are never joined
    assert not unused


@pytest.mark.parametrize(
    ("turns", "kept", "dropped"),
    [
        (
            [("user", "a"), ("gpt", "b"), ("gpt", "c"), ("user", "d")],
            ["a", "b"],
            {"cut at assistant after assistant": 2},
        ),
        ([("user", "a"), ("gpt", "b"), ("user", " "), ("gpt", "c")], ["a", "b"], {"cut at empty user message": 2}),
        ([("user", "a"), ("user", "b"), ("gpt", "c")], ["a"], {"cut at user after user": 2}),
        ([("user", "a"), ("gpt", "b"), ("system", "s")], ["a", "b"], {"cut at system after assistant": 1}),
        ([("user", "a"), ("gpt", "b"), ("tool", "12"), ("gpt", "c")], ["a", "b"], {"cut at tool after assistant": 2}),
        ([("user", "a"), ("gpt", None)], ["a"], {"empty assistant message": 1}),
        ([("user", "a"), ("gpt", ""), ("user", "b"), ("gpt", "c")], ["a", "", "b", "c"], {}),
        ([("user", "a"), ("gpt", 7)], ["a"], {"cut where the assistant's message is of type int, not text": 1}),
    ],
)
def test_a_conversation_ends_before_what_cannot_be_used(
    turns: list[tuple[str, Any]], kept: list[str], dropped: dict[str, int]
) -> None:
    counts: Counter[str] = Counter()
    messages = normalise([{"role": role, "content": text} for role, text in turns], counts, Counter())
    assert [message["content"] for message in messages] == kept
    assert counts == dropped


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("gpt", "hello")], "assistant before any user turn"),
        ([("gpt", "hello"), ("human", "yes"), ("gpt", "b")], "assistant before any user turn"),
        ([], "no user turn"),
        ([("system", "only")], "no user turn"),
        ([("human", ""), ("gpt", "x"), ("human", "y")], "empty user message"),
        ([("human", None)], "the user's message is empty (null), not text"),
        ([("human", 7)], "the user's message is of type int, not text"),
        ([("human", [{"type": "image_url"}])], "a part of the user's message is 'image_url', not text"),
        ([("human", "broken \ud83d")], "the user's message holds half a character (a lone surrogate)"),
        ([("Mensch", "hallo")], "unknown role 'Mensch'"),
    ],
)
def test_unusable_records_are_dropped_with_a_reason(tmp_path: Path, turns: list[tuple[str, Any]], reason: str) -> None:
    good = {"conversations": [{"from": "human", "value": "hi"}]}
    bad = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    conversations, report = read(write(tmp_path / "data.jsonl", [good, bad]))
    assert len(conversations) == 1
    assert report.dropped_records == {reason: 1}


def test_a_source_of_only_unknown_roles_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "Mensch", "content": "hallo"}]}])
    with pytest.raises(UserError, match=r"1 records .* no usable conversation .*unknown role 'Mensch'"):
        read(path)


def test_unknown_layout_names_keys_and_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keys \['foo', 'questions'\]: 'questions' is near to 'question' of"):
        read(write(tmp_path / "d.jsonl", [{"foo": 1, "questions": "a"}]))


def test_category_of_the_record_then_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "category": "math"}, {"prompt": "b"}])
    assert [c.category for c in read(path, category="mine")[0]] == ["math", "mine"]
    assert [c.category for c in read(path)[0]] == ["math", "general"]


ROWS = [{"prompt": f"número {i} 🙂 " + "x" * 50} for i in range(40)]


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, ensure_ascii=False, indent=1),
        "\n".join(json.dumps(row) for row in ROWS),
        json.dumps({"version": 1, "data": ROWS}),
    ],
)
def test_json_in_any_arrangement_and_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    conversations, _ = read(path)
    assert [c.user_turns[0] for c in conversations] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("chunk", [16, 2**20])
def test_truncated_json_is_an_error_or_salvaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    at = whole.index("número 30".encode()) - len('{"prompt": "')
    cut = whole[: at + 14]  # in the middle of a two-byte character
    path = tmp_path / "data.json"
    path.write_bytes(cut)
    with pytest.raises(UserError, match=rf"damaged at byte {at:,} .*after 30 whole records.*on_damage: salvage"):
        read(path)
    conversations, report = read(path, on_damage="salvage")
    assert len(conversations) == 30
    assert report.damage is not None
    assert (report.damage.records_read, report.damage.bytes_lost) == (30, 14)


def test_truncated_between_records(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"prompt": "a"},')
    with pytest.raises(UserError, match="the list is not closed"):
        read(path)
    assert len(read(path, on_damage="salvage")[0]) == 1


def test_broken_record_in_the_middle_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"prompt": "a"}, {"prompt": oops}, {"prompt": "' + "b" * 100 + '"}]')
    with pytest.raises(UserError, match=r"damaged at byte 18 .*Expecting value"):
        read(path)


def test_bad_jsonl_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n')
    with pytest.raises(UserError, match=r"damaged at line 2 .*after 1 whole records"):
        read(path)
    conversations, report = read(path, on_damage="salvage")
    assert len(conversations) == 1
    assert report.damage is not None
    assert report.damage.bytes_lost == path.stat().st_size - 16


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("content", [b"<html>not json</html>", b"\xff\xfe\x00binary"])
@pytest.mark.parametrize("on_damage", ["error", "salvage"])
def test_no_json_at_all_is_an_error_either_way(tmp_path: Path, name: str, content: bytes, on_damage: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not JSON|in UTF-16, expected UTF-8"):
        read(path, on_damage=on_damage)


def test_gzip_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    packed = gzip.compress(("".join(json.dumps({"prompt": f"{i} {i * 7919}"}) + "\n" for i in range(2000))).encode())
    path.write_bytes(packed)
    assert len(read(path)[0]) == 2000
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="damaged at"):
        read(path)
    conversations, report = read(path, on_damage="salvage")
    assert 100 < len(conversations) < 2000
    assert report.damage is not None


def test_parquet_and_data_set_folder(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "dataset"
    folder.mkdir()
    table = pyarrow.Table.from_pylist([{"messages": EXPECTED, "category": "chat"}] * 3)
    pyarrow.parquet.write_table(table, folder / "train-00000.parquet")
    for path in (folder / "train-00000.parquet", folder):
        conversations, report = read(path)
        assert [c.messages for c in conversations] == [EXPECTED] * 3
        assert conversations[0].category == "chat"
        assert report.layout == "messages"
    with pytest.raises(UserError, match=r"no split 'nowhere': set the source's `split` to one of \['train'\]"):
        read(folder, split="nowhere")
