"""Layouts: each to the exact conversation, with nothing lost in silence; folders; rows that are tokenised already."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from specflow.config import DataSource
from specflow.config import Layout as LayoutName
from specflow.data import layouts
from specflow.data.conversations import Conversation, SourceReport, read_conversations
from specflow.errors import UserError
from specflow.targets.template import encode_conversation
from tests import ROOT
from tests.toys import make_tiny_tokenizer

FIELD = ROOT.parent / "shared" / "data" / "field"
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
QUIET = {"role": "system", "content": "be quiet"}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}


def read(path: Path, tokenizer: Any = None, **options: Any) -> tuple[list[Conversation], SourceReport]:
    report = SourceReport("test")
    source = DataSource(source=f"file:{path}", **options)
    return list(read_conversations(source, path, report, tokenizer)), report


def one(tmp_path: Path, record: dict[str, Any], tokenizer: Any = None) -> tuple[list[dict[str, Any]], SourceReport]:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (conversation,), report = read(path, tokenizer)
    return conversation.messages, report


@pytest.mark.parametrize(
    ("layout", "record", "expected"),
    [
        (
            "sharegpt",
            {"conversations": json.dumps([{"from": "human ", "value": "hi"}, {"from": "AI", "value": "hello"}])},
            ASKED,
        ),
        ("sharegpt", {"system": "be quiet", "conversations": [{"from": "human", "value": "hi"}]}, [QUIET, ASKED[0]]),
        (
            "messages",
            {"system": "be", "messages": [{"role": "developer", "content": "quiet"}, *ASKED]},
            [{**QUIET, "content": "be\n\nquiet"}, *ASKED],
        ),
        ("messages", {"system": "be quiet", "messages": [QUIET, *ASKED]}, [QUIET, *ASKED]),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASKED[1]]}, ASKED),
        ("conversation", {"conversation_id": "1", "conversation": ASKED}, ASKED),
        ("ultrachat", {"data": ["hi", "hello"]}, ASKED),
        ("sharegpt", {"conversations": ["hi", "hello"]}, ASKED),
        (
            "messages",
            {"messages": [{**QUIET, "content": "be"}, {"role": "developer", "content": "quiet"}, *ASKED]},
            [{**QUIET, "content": "be\n\nquiet"}, *ASKED],
        ),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "system": "be quiet"}, [QUIET, *ASKED]),
        (
            "alpaca",
            {"instruction": "hi", "output": "hello", "history": [["a", "b"]]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *ASKED],
        ),
        (
            "alpaca",
            {"instruction": "hi", "context": "a passage", "response": "hello"},
            [{"role": "user", "content": "hi\n\na passage"}, ASKED[1]],
        ),
        ("question", {"system_prompt": "be quiet", "question": "hi", "response": "hello"}, [QUIET, *ASKED]),
        (
            "question",
            {"question": "hi", "context": ["one", "two"], "answer": "hello"},
            [{"role": "user", "content": "hi\n\none\ntwo"}, ASKED[1]],
        ),
        (
            "question",
            {"question": "hi", "reasoning": "hm", "answer": "hello"},
            [ASKED[0], {**ASKED[1], "reasoning_content": "hm"}],
        ),
        ("problem", {"problem": "hi", "solution": "hello"}, ASKED),
        ("query", {"query": "hi", "response": "hello"}, ASKED),
        ("input", {"input": "hi", "output": "hello"}, ASKED),
        ("input", {"input": [QUIET, ASKED[0]], "output": "hello", "reasoning": "on"}, [QUIET, *ASKED]),
        ("prompt", {"prompt": "hi", "completion": "hello"}, ASKED),
        ("prompt", {"prompt": [QUIET, ASKED[0]], "completion": [ASKED[1]]}, [QUIET, *ASKED]),
        ("prompt", {"prompt": "hi", "chosen": ASKED}, ASKED),
        ("prompt", {"prompt": "[1, 2] sorted?"}, [{"role": "user", "content": "[1, 2] sorted?"}]),
        ("chosen", {"chosen": ASKED}, ASKED),
    ],
)
def test_a_layout_gives_exactly_this_conversation(
    tmp_path: Path, layout: str, record: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    messages, report = one(tmp_path, record)
    assert (messages, report.layout) == (expected, layout)
    assert not report.dropped_records + report.dropped_messages
    assert not set(report.unused_fields) - {"reasoning"}


def test_settings_docs_and_table_name_the_same_layouts() -> None:
    assert set(LayoutName.__args__) == {"auto", *layouts.BY_NAME}  # type: ignore[attr-defined]
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [layout.name for layout in layouts.LAYOUTS if f"| `{layout.name}` |" not in page] == []
    columns = {c for each in layouts.LAYOUTS for c in (*each.conversation, *each.question, *each.context, *each.answer)}
    assert {column for column in columns if f"`{column}`" not in page} == set()


def test_fields_that_no_layout_uses_are_named_with_their_counts(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    record = {"id": 1, "model": "m", "turn": 1, "note": None, "messages": [{**ASKED[0], "name": "Bo", "lang": "en"}]}
    path.write_text((json.dumps(record) + "\n") * 3)
    report = read(path)[1]
    assert report.unused_fields == {"model": 3, "turn": 3, "message.name": 3, "message.lang": 3}
    assert report.line() == (
        "test (messages): 3 records, 3 conversations; fields not used: model 3, turn 3, message.name 3, message.lang 3"
    )


@pytest.mark.parametrize(
    "turns",
    [
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "lookup", "arguments": '{"q": 1}'}}],
            },
            {"role": "tool", "content": "12"},
        ],
        [
            {"role": "assistant", "content": "", "function_call": {"name": "lookup", "arguments": {"q": 1}}},
            {"role": "function", "content": "12"},
        ],
        [
            {"from": "function_call", "value": '{"name": "lookup", "arguments": {"q": 1}}'},
            {"from": "observation", "value": "12"},
        ],
    ],
)
def test_tool_turns_stay_in_the_conversation(tmp_path: Path, turns: list[dict[str, Any]]) -> None:
    record = {"messages": [ASKED[0], *turns, {"role": "assistant", "content": "it is 12"}], "tools": json.dumps([TOOL])}
    messages, report = one(tmp_path, record)
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"q": 1}}}
    assert messages == [
        {**ASKED[0], "tools": [TOOL]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "it is 12"},
    ]
    assert not report.unused_fields and not report.dropped_messages


@pytest.mark.parametrize(
    ("mark", "trained"), [({"weight": 0}, False), ({"loss": False}, False), ({"train": True}, True)]
)
def test_marks_of_answers_not_to_train(tmp_path: Path, mark: dict[str, Any], trained: bool) -> None:
    messages, _ = one(tmp_path, {"messages": [ASKED[0], {**ASKED[1], **mark}]})
    assert messages[1] == (ASKED[1] if trained else {**ASKED[1], "train": False})
    rejected, report = one(tmp_path, {"prompt": "hi", "completion": "hello", "label": trained})
    assert rejected[1] == messages[1] and not report.unused_fields


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "<|im_start|>user\nhi<|im_end|>"}, "text is rendered already (<|im_start|>)"),
        ({"prompt": "[INST] hi [/INST]"}, "prompt is rendered already ([INST])"),
        ({"text": "Human: hi\n\nAssistant: hello"}, "text is a whole dialogue"),
        ({"question": "what is it", "image": {"bytes": "x"}}, "has image, and only text is used"),
        ({"question": "a", "answer": ["b", "c"]}, "answer is a list of several answers"),
        ({"question": "a", "context": {"title": []}}, "context is not text"),
        ({"instruction": "a", "history": "yes"}, "history is no list of pairs"),
        ({"messages": ASKED, "tools": "yes"}, "tools are no list of functions with names"),
        ({"text": "hi", "role": "prompter"}, "is one message of a dialogue (it has a role), not a conversation"),
        ({"prompt": "\n\nHuman: hi\n\nAssistant:"}, "prompt is a whole dialogue"),
        (
            {"question": "a or b?", "choices": ["a", "b"]},
            "has choices beside the question, which no layout writes into it",
        ),
        ({"conversations": [{"user": "hi", "assistant": "hello"}]}, "message without a role"),
        ({"conversation": [["human", "hi"]]}, "an entry of conversation is no object"),
    ],
)
def test_refused_records_say_why(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record) + "\n")
    report = SourceReport("test")
    with pytest.raises(UserError, match="no usable conversation"):
        list(read_conversations(DataSource(source="file:d"), path, report))
    assert [each.partition(":")[0] for each in report.dropped_records] == [reason]


def test_each_file_of_a_folder_has_its_own_schema(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASKED[1]]
    (tmp_path / "train-0.jsonl").write_text(json.dumps({"messages": ASKED}) + "\n")
    (tmp_path / "train-1.jsonl").write_text(json.dumps({"messages": parts, "more": {"a": 1}}) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": ASKED}]), tmp_path / "odd.parquet")
    conversations, report = read(tmp_path)
    assert [conversation.messages for conversation in conversations] == [ASKED, ASKED]
    assert report.files_not_read == ["odd.parquet"]
    assert "files not read: odd.parquet" in report.line()


def test_each_record_has_its_own_layout(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ASKED}) + "\n")
    records = [{"messages": None, "instruction": "hi", "output": "hello"}, {"title": "x"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    conversations, report = read(tmp_path)
    assert [conversation.messages for conversation in conversations] == [ASKED, ASKED]
    assert report.layout == "messages + alpaca"
    assert report.dropped_records == {"no column of a known layout": 1}


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"messages": ASKED}] * 2).save_to_disk(tmp_path / "saved")
    assert [conversation.messages for conversation in read(tmp_path / "saved")[0]] == [ASKED] * 2


def test_a_snapshot_of_links_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_text(json.dumps({"messages": ASKED}) + "\n")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert [conversation.messages for conversation in read(tmp_path / "snapshot")[0]] == [ASKED]


TURNS = [QUIET, {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
MORE = [*TURNS, {"role": "user", "content": "sees"}, {"role": "assistant", "content": "one bird"}]


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:], MORE, MORE[1:]])
def test_rows_of_tokens_become_the_messages_they_were_made_from(tmp_path: Path, messages: list[dict[str, str]]) -> None:
    tokenizer = make_tiny_tokenizer()
    ids, spans = encode_conversation(tokenizer, messages)
    mask = [int(any(start <= i < end for start, end in spans)) for i in range(len(ids))]
    assert one(tmp_path, {"input_ids": ids, "loss_mask": mask}, tokenizer)[0] == messages
    assert one(tmp_path, {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tokenizer)[0] == messages
    only_last = [mask[i] if i >= spans[-1][0] else 0 for i in range(len(ids))]
    read_back = one(tmp_path, {"input_ids": ids, "loss_mask": only_last}, tokenizer)[0]
    assert [m.get("train", True) for m in read_back if m["role"] == "assistant"] == [False] * (len(spans) - 1) + [True]
    cut = one(tmp_path, {"input_ids": ids[: spans[-1][1] - 1]}, make_tiny_tokenizer())[0] if len(spans) > 1 else []
    assert cut == (messages[:-2] if cut else [])  # an answer without its end is left out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids, mask: {"input_ids": ids[::-1], "loss_mask": mask}, "input_ids are not what the target's"),
        (lambda ids, mask: {"input_ids": ids, "loss_mask": mask[1:]}, "loss_mask is not as long as input_ids"),
        (lambda ids, mask: {"input_ids": ids, "loss_mask": [0] * (len(ids) - 3) + [1, 1, 0]}, "loss_mask cuts through"),
        (lambda ids, mask: {"input_ids": [1.5], "loss_mask": [1]}, "input_ids is no list of whole numbers"),
    ],
)
def test_rows_of_other_tokens_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    tokenizer = make_tiny_tokenizer()
    ids, _ = encode_conversation(tokenizer, TURNS)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(change(ids, [1] * len(ids))) + "\n")
    with pytest.raises(UserError, match=rf"no usable conversation \(dropped: {reason}"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "options", "count", "roles", "dropped"),
    [
        ("folder-parts", {}, 60, "ua", {}),
        ("sharegpt-system-field.jsonl", {}, 40, "sua", {}),
        ("reasoning-content.jsonl", {}, 40, "uaua", {}),
        ("openai-tools-empty.jsonl", {}, 40, "uataua", {}),
        ("openai-tools-null.jsonl", {}, 40, "uataua", {}),
        ("openai-tools-mixed.jsonl", {}, 48, None, {"empty assistant message": 12}),
        ("developer-role.jsonl", {}, 40, "sua", {}),
        ("lmsys-conversation.jsonl", {}, 40, "ua", {}),
        ("gsm8k-question.jsonl", {}, 40, "ua", {}),
        ("code-input-output.jsonl", {}, 40, "ua", {}),
        ("trl-prompt-messages.jsonl", {}, 40, "sua", {}),
        ("json-string.parquet", {}, 40, "ua", {}),
        ("data[1] part.parquet", {}, 40, "ua", {}),
        ("hub-folder-configs", {"config": "one"}, 40, "u", {}),
    ],
)
def test_inputs_of_the_field_check(
    name: str, options: dict[str, str], count: int, roles: str | None, dropped: dict[str, int]
) -> None:
    path = FIELD / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project")
    conversations, report = read(path, **options)
    assert (len(conversations), report.records) == (count, count)
    assert not report.dropped_records
    assert report.dropped_messages == dropped
    found = {"".join(message["role"][0] for message in conversation.messages) for conversation in conversations}
    assert found == ({roles} if roles else {"u", "ua"})
    texts = [message["content"] for conversation in conversations for message in conversation.messages]
    assert not [text for text in texts if text.startswith(("[{", '"'))]
