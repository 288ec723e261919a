"""Records of a data source as conversations: layouts, role names, what is dropped and why.

A conversation has an optional system message, then user and assistant in turn. `normalise` gets there by
these rules, each use of which is counted: texts are stripped, messages that are empty or of an unknown role
go, assistant messages before the first user turn go, and the conversation ends before the first message that
is not its side's turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specflow.config import DataSource
from specflow.data.groups import conversation_id
from specflow.data.records import Damage, read_records
from specflow.errors import UserError
from specflow.targets.template import Message

_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}


@dataclass(frozen=True)
class Conversation:
    source: str
    category: str
    messages: list[Message]
    group: str | None = None
    """Id that its source gives the conversation which it is, or is a part of (groups.py)."""

    @property
    def user_turns(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "user"]


@dataclass
class SourceReport:
    """What was read of one source and what became of it; filled while it is read."""

    source: str
    layout: str = "auto"
    records: int = 0
    conversations: int = 0
    dropped_records: Counter[str] = field(default_factory=Counter)
    dropped_messages: Counter[str] = field(default_factory=Counter)
    damage: Damage | None = None


def read_conversations(source: DataSource, path: Path, report: SourceReport) -> Iterator[Conversation]:
    """Conversations of a source whose file or snapshot folder is `path`, streamed; `report` counts along.

    Raises UserError for damage (unless the source says `salvage`), an unknown layout, or a source with
    records but no usable conversation.
    """
    reason = None
    for record in read_records(path, split=source.split, salvage=source.on_damage == "salvage", report=report):
        report.records += 1
        if report.layout == "auto":
            report.layout = source.format if source.format != "auto" else _detect(record, path)
        messages, reason = _messages(record, report.layout)
        if reason is None:
            messages, reason = normalise(messages, report.dropped_messages)
        if reason is not None:
            report.dropped_records[reason] += 1
            continue
        report.conversations += 1
        category = record.get("category")
        named = category if isinstance(category, str) and category.strip() else source.category
        yield Conversation(report.source, named or "general", messages, conversation_id(record))
    if not report.conversations:
        why = {**report.dropped_records, **report.dropped_messages}
        raise UserError(
            f"{path} has {report.records} records of layout {report.layout} and no usable conversation "
            f"(dropped: {why or 'none'}): set the source's format, or correct the data"
        )


def _detect(record: dict[str, Any], path: Path) -> str:
    """Layout of a source by the keys of its first record."""
    if "conversations" in record:
        return "sharegpt"
    if "messages" in record:
        return "messages"
    if "data" in record:
        return "ultrachat"
    if "instruction" in record:
        return "alpaca"
    if any(key in record for key in ("prompt", "text", "turns")):
        return "prompt"
    raise UserError(
        f"{path}: cannot tell the layout of records with the keys {sorted(record)[:10]}: expected one of "
        "conversations, messages, data, instruction, prompt, text, turns; convert the file"
    )


def _messages(record: dict[str, Any], layout: str) -> tuple[list[tuple[Any, Any]], str | None]:
    """(role, text) pairs of a record as it stands, or the reason why it has none."""
    if layout == "alpaca":
        instruction, extra = record.get("instruction"), record.get("input")
        if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
            instruction = f"{instruction}\n\n{extra}"
        return [("user", instruction), ("assistant", record.get("output") or "")], None
    if layout == "prompt":
        turns = next((record[key] for key in ("turns", "prompt", "text") if key in record), None)
        if isinstance(turns, str):
            return [("user", turns)], None
        if not isinstance(turns, list):
            return [], "no prompt, text or turns"
        return [("user", turn) for turn in turns], None
    if layout == "ultrachat" and "messages" not in record:
        turns = record.get("data")
        if not isinstance(turns, list):
            return [], "no list of data"
        return [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)], None
    key = "conversations" if layout == "sharegpt" else "messages"
    turns = record.get(key)
    if not isinstance(turns, list):
        return [], f"no list of {key}"
    if not all(isinstance(turn, dict) for turn in turns):
        return [], f"an entry of {key} is no object"
    return [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns], None


def normalise(pairs: list[tuple[Any, Any]], dropped: Counter[str]) -> tuple[list[Message], str | None]:
    """Messages in turn (system? user assistant user ...), or the reason why the record is unusable.

    Consecutive user turns are cut unless the record has nothing but user turns (a list of prompts): those get
    empty answers between them, for the target to give. `dropped` counts messages left out by reason.
    """
    messages: list[Message] = []
    prompts_only = all(_ROLES.get(str(role).lower()) in ("user", "system") for role, _ in pairs)
    for position, (raw_role, content) in enumerate(pairs):
        role = _ROLES.get(str(raw_role).lower())
        if role is None:
            dropped[f"unknown role {str(raw_role)[:30]!r}"] += 1
            continue
        text = _text(content)
        if text is None:
            return [], "a message is not text"
        if not text:
            if role == "user" and not any(message["role"] == "user" for message in messages):
                return [], "first user turn is empty"
            dropped[f"empty {role} message"] += 1
            continue
        last = messages[-1]["role"] if messages else None
        if role == "user" and last == "user" and prompts_only:
            messages.append({"role": "assistant", "content": ""})
        elif role == "assistant" and last in (None, "system"):
            dropped["assistant message before the first user turn"] += 1
            continue
        elif role == last or (role == "system" and last is not None):
            dropped[f"cut at {role} after {last}"] += len(pairs) - position
            break
        messages.append({"role": role, "content": text})
    if not any(message["role"] == "user" for message in messages):
        return [], "no user turn"
    return messages, None


def _text(content: Any) -> str | None:
    """Stripped text of a content that is a string or OpenAI's list of text parts; None for anything else."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        return None
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate escape: no tokenizer and no file takes it
        return None
    return content.strip()
