"""Layouts of records: which of their fields hold a conversation, as one table, and how each is read.

A record becomes a list of messages in OpenAI's form, roles and contents as the data set has them; what those must be
is for `conversations` to judge. Fields that are neither used nor refused are counted by name.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from specflow.data.groups import ID_KEYS
from specflow.data.records import parse_json

Record = dict[str, Any]
Turns = list[dict[str, Any]]


class Refused(Exception):
    """A record that cannot be used, with the reason under which it is counted."""


@dataclass(frozen=True)
class Layout:
    """Columns of one layout; where several are named, the first that a record has is used."""

    name: str
    key: str
    """Column that tells this layout from those behind it."""
    conversation: tuple[str, ...] = ()
    """Whole conversation: messages, or texts of user and assistant in turn."""
    question: tuple[str, ...] = ()
    """Text of the user, a list of messages, or a list of texts that are put one after another."""
    context: tuple[str, ...] = ()
    """Text that belongs to the question and is put behind it."""
    answer: tuple[str, ...] = ()
    """Text of the assistant, or a list of messages."""


LAYOUTS = (
    Layout("sharegpt", "conversations", conversation=("conversations",)),
    Layout("messages", "messages", conversation=("messages",)),
    Layout("conversation", "conversation", conversation=("conversation",)),
    Layout("ultrachat", "data", conversation=("data", "messages")),
    Layout("tokens", "input_ids", conversation=("input_ids",)),
    Layout(
        "alpaca",
        "instruction",
        question=("instruction",),
        context=("input", "context"),
        answer=("output", "response", "completion", "answer"),
    ),
    Layout(
        "question", "question", question=("question",), context=("context",), answer=("answer", "response", "output")
    ),
    Layout(
        "problem", "problem", question=("problem",), context=("context",), answer=("solution", "response", "answer")
    ),
    Layout("query", "query", question=("query",), context=("context",), answer=("response", "answer", "output")),
    Layout("input", "input", question=("input",), context=("context",), answer=("output", "response", "answer")),
    Layout(
        "prompt",
        "prompt",
        question=("prompt", "text", "turns"),
        context=("context",),
        answer=("completion", "chosen", "response", "output", "answer"),
    ),
    Layout("chosen", "chosen", conversation=("chosen",)),
)
"""In the order in which `auto` looks for their keys."""
_KEYS = {**{layout.key: layout for layout in LAYOUTS}, **dict.fromkeys(("text", "turns"), LAYOUTS[-2])}
BY_NAME = {layout.name: layout for layout in LAYOUTS}

# Beside the conversation, in every layout.
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
BESIDE = {*SYSTEM, *TOOLS, *ID_KEYS, "category"}
# Beside a question.
HISTORY = ("history",)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Without these the texts are not what was said, or asked.
_SWITCHES = {"on", "off", "true", "false", "yes", "no", "none"}
"""What such a column holds where it says whether to think."""
_NOTHING: tuple[Any, ...] = (None, "", [], {})
CHOICES = ("choices", "options")
REFUSED = ("image", "images", "video", "videos", "audio", "audios")

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_MARKUP = re.compile(
    r"<\|(im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|endoftext|user|assistant|system|end)\|>"
    r"|<(start|end)_of_turn>|\[/?INST\]|\[\|(Human|AI)\|\]"
)
_SPEAKERS = (
    re.compile(r"(?m)^\W*(human|user|instruction)\s*:", re.I),
    re.compile(r"(?m)^\W*(assistant|response)\s*:", re.I),
)
_ASKS_IN_ROLES = re.compile(r"(?is)\A\s*(human|user)\s*:.*\n\s*(assistant|response)\s*:\s*\Z")


def detect(record: Record) -> Layout | None:
    """Layout of a record by its columns; one without a value counts only where no other has one."""
    filled = (layout for key, layout in _KEYS.items() if record.get(key) is not None)
    return next(filled, next((layout for key, layout in _KEYS.items() if key in record), None))


def unknown(record: Record) -> str:
    """What to say of a record whose layout is none of the table: its keys, the nearest layout, what to do."""
    keys = [str(key) for key in record]
    near = ((difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.6), key) for key in keys)
    close = next(((found[0], key) for found, key in near if found), None)
    hint = f"{close[1]!r} is near to {close[0]!r} of layout {_KEYS[close[0]].name}; " if close else ""
    return (
        f"cannot tell the layout of records with the keys {keys[:10]}: {hint}rename the column that holds the "
        f"conversation or question to one of {', '.join(_KEYS)}"
    )


def turns_of(record: Record, layout: Layout, unused: Counter[str]) -> tuple[Turns, Any]:
    """Messages of a record as they stand, system message in front, and its tools; `unused` counts fields left out.

    Raises Refused.
    """
    for name in REFUSED:
        if record.get(name):
            raise Refused(f"has {name}, and only text is used")
    if layout.conversation:
        key, value = _first(record, layout.conversation, layout.key)
        turns, used = _conversation(key, value), {key}
    else:
        turns, used = _question_and_answer(record, layout)
    unused.update(key for key, value in record.items() if key not in used | BESIDE and value not in _NOTHING)
    for key in SYSTEM:
        if record.get(key) not in _NOTHING:
            turns = _with_system(turns, record[key])
    return turns, next((unpacked(record[key]) for key in TOOLS if record.get(key) not in _NOTHING), None)


def role_of(turn: dict[str, Any]) -> str | None:
    """Role of a message in OpenAI's words, `call` for ShareGPT's function_call; None for a word that is unknown."""
    return _ROLES.get(str(turn.get("from", turn.get("role"))).strip().lower())


def thoughts_of(holder: dict[str, Any]) -> str:
    """Thoughts of a message or record, "" where it has none or only says whether to think."""
    found = next((holder[name] for name in THOUGHTS if isinstance(holder.get(name), str)), "")
    return "" if found.strip().lower() in _SWITCHES else found


def content_of(turn: dict[str, Any]) -> Any:
    return turn.get("value", turn.get("content"))


def _first(record: Record, names: Iterable[str], otherwise: str) -> tuple[str, Any]:
    """The first column that a record has, with its value; `otherwise` where it has none."""
    key = next((name for name in names if name in record), otherwise)
    return key, record.get(key)


def unpacked(value: Any) -> Any:
    """A list or object of objects out of its JSON, which columns of text hold; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = parse_json(value)
    except ValueError:
        return value
    return found if _are_objects(found) or isinstance(found, dict) else value


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _conversation(key: str, value: Any) -> Turns:
    turns = unpacked(value)
    if not isinstance(turns, list):
        raise Refused(f"no list of {key}")
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    if not _are_objects(turns):
        raise Refused(f"an entry of {key} is no object")
    return list(turns)


def _question_and_answer(record: Record, layout: Layout) -> tuple[Turns, set[str]]:
    """Messages of a record of columns, and the columns that were used."""
    if isinstance(record.get("role"), str):
        raise Refused("is one message of a dialogue (it has a role), not a conversation")
    for name in CHOICES:
        if record.get(name) not in _NOTHING:
            raise Refused(f"has {name} beside the question, which no layout writes into it")
    key, question = _first(record, layout.question, layout.key)
    answer_key, answer = _first(record, layout.answer, key)
    if isinstance(question, str):
        _check_not_rendered(key, question)
    question = unpacked(question)
    answers = [] if answer_key == key else _answer(answer_key, answer, record)
    if answers and role_of(answers[0]) in ("system", "user"):
        return answers, {key, answer_key}  # the answer repeats the question, as preference data does
    if _are_objects(question):
        turns = list(question)
    else:
        texts = question if isinstance(question, list) else [question]
        turns = [{"role": "user", "content": text} for text in texts]
    if turns and (context := _context(record, layout)):
        if len(turns) > 1 or not isinstance(content_of(turns[0]), str):
            raise Refused("a context beside several turns")
        turns = [{"role": "user", "content": f"{content_of(turns[0])}\n\n{context}"}]
    return [*_history(record), *turns, *answers], {key, answer_key, *layout.context, *HISTORY, *THOUGHTS} | (
        {"label"} if isinstance(record.get("label"), bool) else set()
    )


def _check_not_rendered(key: str, text: str) -> None:
    """Raises Refused for a whole dialogue in one text, which would become one turn of the user."""
    found = _MARKUP.search(text)
    dialogue = _SPEAKERS if key == "text" else [_ASKS_IN_ROLES]
    if found or all(speaker.search(text) for speaker in dialogue):
        what = f"{key} is rendered already ({found[0]})" if found else f"{key} is a whole dialogue"
        raise Refused(f"{what}: name the data set of messages that it was made from")


def _answer(key: str, answer: Any, record: Record) -> Turns:
    answer = unpacked(answer)
    if answer in _NOTHING:
        return []
    if isinstance(answer, list):
        if not _are_objects(answer):
            raise Refused(f"{key} is a list of several answers")
        return list(answer)
    thoughts = thoughts_of(record)
    rejected = {"train": False} if record.get("label") is False else {}  # in TRL's unpaired preferences
    return [
        {"role": "assistant", "content": answer, **({"reasoning_content": thoughts} if thoughts else {}), **rejected}
    ]


def _context(record: Record, layout: Layout) -> str:
    """What belongs to the question: Alpaca's input, a passage to read."""
    contexts = []
    for key in layout.context:
        value = record.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if not isinstance(value, str | None):
            raise Refused(f"{key} is not text")
        contexts += [value] if value and value.strip() else []
    return "\n\n".join(contexts)


def _history(record: Record) -> Turns:
    """Earlier turns as pairs of question and answer, or as messages."""
    history = record.get("history")
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = parse_json(history)
        except ValueError:
            raise Refused("history is no list of pairs") from None
    if history in _NOTHING:
        return []
    if _are_objects(history):
        return list(history)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Refused("history is no list of pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _with_system(turns: Turns, system: Any) -> Turns:
    """The column's system message in front of the conversation's own, unless it is the same."""
    if turns and role_of(turns[0]) == "system":
        own = content_of(turns[0])
        if own == system:
            return turns
        if isinstance(own, str) and isinstance(system, str):
            return [{"role": "system", "content": f"{system}\n\n{own}"}, *turns[1:]]
    return [{"role": "system", "content": system}, *turns]
