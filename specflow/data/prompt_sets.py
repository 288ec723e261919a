"""Benchmark questions: jsonl (or jsonl.gz) in MT-Bench's layout or HumanEval's.

MT-Bench: `question_id, category, turns, reference`. HumanEval: `task_id, prompt`; its prompt is the beginning
of a program, which a chat model would answer with talk, so it is wrapped in an instruction to complete the
function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.errors import UserError
from specflow.sources import open_binary

_COMPLETE = "Complete the following Python function.\n\n```python\n{prompt}\n```"


@dataclass(frozen=True)
class Question:
    question_id: str
    category: str
    turns: list[str]
    reference: list[str] | None = None


def read_prompt_set(name: str, path: Path) -> list[Question]:
    """Questions of the prompt set `name`, whose name is the category of questions without one.

    Raises UserError with the line for what is not JSON, of another layout, without a turn, or there twice.
    """
    questions: list[Question] = []
    seen: set[str] = set()
    try:
        with open_binary(path) as stream:
            lines = stream.read().decode("utf-8").split("\n")
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt set {name}: {path} cannot be read ({error}): expected jsonl or jsonl.gz") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"prompt set {name}: {path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg}): expected one question a line") from None
        question = _question(record, name, where)
        if question.question_id in seen:
            raise UserError(
                f"{where} has the id {question.question_id!r} of an earlier line: give each question its own"
            )
        seen.add(question.question_id)
        questions.append(question)
    if not questions:
        raise UserError(f"prompt set {name}: {path} has no question: name another file")
    return questions


def _question(record: Any, name: str, where: str) -> Question:
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}, expected an object with question_id and turns")
    if "task_id" in record:
        prompt = _texts(record.get("prompt"), "prompt", where)[0]
        solution = record.get("canonical_solution")
        text = _COMPLETE.format(prompt=prompt.rstrip())
        return Question(str(record["task_id"]), "coding", [text], [solution] if isinstance(solution, str) else None)
    for key in ("question_id", "turns"):
        if key not in record:
            raise UserError(
                f"{where} lacks {key!r}: expected question_id, category, turns (or HumanEval's task_id, prompt)"
            )
    if not isinstance(record["turns"], list):
        raise UserError(f"{where}: 'turns' is {record['turns']!r:.40}, expected a list of texts")
    reference = record.get("reference")
    return Question(
        str(record["question_id"]),
        str(record.get("category") or name),
        _texts(record["turns"], "turns", where),
        None if reference is None else _texts(reference, "reference", where, may_be_empty=True),
    )


def _texts(value: Any, key: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and (may_be_empty or text.strip()) for text in texts):
        raise UserError(f"{where}: {key!r} holds an empty or non-text entry: expected texts")
    if not texts and not may_be_empty:
        raise UserError(f"{where}: {key!r} is empty: expected at least one text")
    return texts
