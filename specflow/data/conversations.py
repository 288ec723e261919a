"""Records of a data source as conversations: what a message may be, what is dropped and why.

A conversation has an optional system message, then user and assistant in turn; between the two may stand calls of tools
and their results. Dropping a message never changes what its neighbours mean: a conversation ends before the first
message that cannot be used, or is dropped as a whole. Every drop is counted by reason, every field left out by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.config import DataSource
from specflow.data import layouts
from specflow.data.groups import conversation_id
from specflow.data.layouts import Refused
from specflow.data.records import Damage, parse_json, read_records
from specflow.data.tokenised import TokenReader
from specflow.errors import UserError
from specflow.targets.template import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = ("weight", "loss", "train")
"""How data sets say whether an answer is to be trained."""
_KNOWN = {"from", "role", "value", "content", "tool_calls", "function_call", "tool_call_id", *layouts.THOUGHTS, *_MARKS}


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
    unused_fields: Counter[str] = field(default_factory=Counter)
    files_not_read: list[str] = field(default_factory=list)
    damage: Damage | None = None

    def line(self) -> str:
        """What was read, dropped and left out, for the terminal."""
        parts = [f"{self.source} ({self.layout}): {self.records} records, {self.conversations} conversations"]
        for what, counts in (
            ("records dropped", self.dropped_records),
            ("messages dropped", self.dropped_messages),
            ("fields not used", self.unused_fields),
        ):
            if counts:
                parts.append(f"{what}: {listed(counts)}")
        if self.files_not_read:
            parts.append(f"files not read: {', '.join(self.files_not_read[:5])}")
        if self.damage:
            parts.append(f"damaged at {self.damage.where}: {self.damage.bytes_lost} bytes lost")
        return "; ".join(parts)


def listed(counts: Counter[str]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def read_conversations(
    source: DataSource, path: Path, report: SourceReport, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Conversation]:
    """Conversations of a source whose file or snapshot folder is `path`, streamed; `report` counts along.

    Rows that are tokenised already need the target's `tokenizer`. Raises UserError for damage (unless the source says
    `salvage`), an unknown layout, or a source with records but no usable conversation.
    """
    given = None if source.format == "auto" else layouts.BY_NAME[source.format]
    salvage, reader = source.on_damage == "salvage", None
    found: dict[str, None] = {}
    for record in read_records(path, split=source.split, config=source.config, salvage=salvage, report=report):
        report.records += 1
        if (layout := given or layouts.detect(record)) is None:
            if not found:
                raise UserError(f"{path}: {layouts.unknown(record)}")
            report.dropped_records["no column of a known layout"] += 1
            continue
        found[layout.name] = None
        report.layout = " + ".join(found)
        try:
            if layout.name == "tokens":
                reader = reader or TokenReader(tokenizer, path)
                turns, tools = reader.turns_of(record, report.unused_fields), None
            else:
                turns, tools = layouts.turns_of(record, layout, report.unused_fields)
            messages = normalise(turns, report.dropped_messages, report.unused_fields, tools)
        except Refused as reason:
            report.dropped_records[str(reason)] += 1
            continue
        report.conversations += 1
        category = record.get("category")
        named = category if isinstance(category, str) and category.strip() and _is_text(category) else source.category
        group = conversation_id(record)
        yield Conversation(report.source, named or "general", messages, group if _is_text(group or "") else None)
    if not report.records:
        raise UserError(f"{path} has no record: name another file")
    if not report.conversations:
        raise UserError(
            f"{path} has {report.records} records of layout {report.layout} and no usable conversation "
            f"(dropped: {listed(report.dropped_records + report.dropped_messages)}): {_advice(report)}"
        )


def _advice(report: SourceReport) -> str:
    if any("rendered already" in reason or "whole dialogue" in reason for reason in report.dropped_records):
        return "name messages, the target's chat template writes the rest"
    if any(reason.startswith(("no list", "an entry")) for reason in report.dropped_records):
        return "set the source's format to the layout of its records, or convert the file"
    return "correct these in the data, or name another source"


def normalise(
    turns: list[dict[str, Any]], dropped: Counter[str], unused: Counter[str], tools: Any = None
) -> list[Message]:
    """Messages in turn: system? (user (assistant tool*)*)*; raises Refused with the reason why a record is unusable.

    A record that has nothing but user turns (a list of prompts) gets empty answers between them, for the target to
    give. `dropped` counts messages left out by reason, `unused` keys of messages. `tools` go with the first message.
    """
    messages: list[Message] = []
    prompts_only = all(layouts.role_of(turn) in ("user", "system") for turn in turns)
    for position, turn in enumerate(turns):
        try:
            message = _message(turn, unused)
        except Refused as reason:
            if not any(kept["role"] == "user" for kept in messages):
                raise
            dropped[f"cut where {reason}"] += len(turns) - position
            break
        if message["role"] == "system" and not message["content"]:
            dropped["empty system message"] += 1
            continue
        if message["role"] == "system" and [kept["role"] for kept in messages] == ["system"]:
            messages[0]["content"] += f"\n\n{message['content']}"  # a system message and a developer's
            continue
        if prompts_only and message["role"] == "user" and messages and messages[-1]["role"] == "user":
            messages.append({"role": "assistant", "content": ""})
        if message["role"] == "assistant" and message.pop("continues", False) and _ends_in(messages, "assistant"):
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        if (wrong := _out_of_turn(message, messages)) is not None:
            if not any(kept["role"] == "user" for kept in messages):
                raise Refused(wrong)
            dropped[f"cut at {wrong}"] += len(turns) - position
            break
        messages.append(message)
    while messages and messages[-1]["role"] == "assistant" and not is_answered(messages[-1]):
        dropped["empty assistant message"] += 1
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise Refused("no user turn")
    if tools is not None and (functions := _tools(tools)):
        messages[0] = {**messages[0], "tools": functions}
    return messages


def is_answered(message: Message) -> bool:
    """Whether an assistant message says something or calls a tool."""
    return bool(message["content"] or message.get("tool_calls"))


def _ends_in(messages: list[Message], role: str) -> bool:
    return bool(messages) and messages[-1]["role"] == role


def _out_of_turn(message: Message, before: list[Message]) -> str | None:
    """What is wrong with a message at its place, None where nothing is."""
    role, last = message["role"], before[-1] if before else None
    if role == "unknown":
        return f"unknown role {message['content']!r}" if message["content"] else "message without a role"
    if role == "user" and not message["content"]:
        return "empty user message"
    after = "nothing" if last is None else last["role"]
    follows = {
        "system": last is None,
        "user": after in ("nothing", "system", "assistant"),
        "assistant": after in ("user", "tool"),
        "tool": after == "tool" or (last is not None and bool(last.get("tool_calls"))),
    }
    if follows[role]:
        return None
    return f"{role} after {after}" if after in ("user", "assistant", "tool") else f"{role} before any user turn"


def _message(turn: dict[str, Any], unused: Counter[str]) -> Message:
    """A message in OpenAI's form, text stripped; role `unknown` with the word as content where it is none of ours."""
    known = _KNOWN | ({"name"} if layouts.role_of(turn) == "tool" else set())
    unused.update(f"message.{key}" for key, value in turn.items() if key not in known and value not in (None, "", []))
    role = layouts.role_of(turn)
    if role is None:
        word = turn.get("from", turn.get("role"))
        return {"role": "unknown", "content": "" if word is None else str(word)[:30]}
    content = layouts.content_of(turn)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(layouts.unpacked(content)), "continues": True}
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(_storable(content, "a tool's result"), ensure_ascii=False)
    if role != "assistant":
        message: Message = {"role": role, "content": _text(content, role)}
        if role == "tool":
            message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
        return message
    message = {"role": role, "content": "" if content is None else _text(content, role)}
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        message["tool_calls"] = _calls(layouts.unpacked(calls))
    if text := _text(layouts.thoughts_of(turn), role):
        message["reasoning_content"] = text
    return message if _is_trained(turn) else {**message, "train": False}


def _is_trained(turn: dict[str, Any]) -> bool:
    marks = {key: turn[key] for key in _MARKS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise Refused(f"an answer's {key} is {str(mark)[:20]!r}, expected 0 or 1")
    return all(marks.values())


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, arguments as an object where their JSON is one."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("a tool call has no function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                parsed = parse_json(arguments)
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}})
    return _storable(found, "a tool call")


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Schemas of functions in OpenAI's form."""
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("tools are no list of functions with names")
        found.append({"type": "function", "function": function})
    return _storable(found, "a tool")


def _storable(value: Any, what: str) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError, TypeError):
        raise Refused(f"{what} cannot be written as JSON") from None
    return value


def _text(content: Any, role: str) -> str:
    """Stripped text of a content that is a string or OpenAI's list of text parts. Raises Refused for anything else."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        for part, text in zip(content, parts, strict=True):
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Refused(f"a part of the {role}'s message is {str(kind)[:30]!r}, not text")
        content = "\n".join(parts)
    if not isinstance(content, str):
        what = "empty (null)" if content is None else f"of type {type(content).__name__}"
        raise Refused(f"the {role}'s message is {what}, not text")
    if not _is_text(content):
        raise Refused(f"the {role}'s message holds half a character (a lone surrogate)")
    return content.strip()


def _is_text(text: str) -> bool:
    """Whether it can be written: no tokenizer and no file takes a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
