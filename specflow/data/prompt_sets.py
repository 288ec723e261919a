"""Benchmark questions from a file: jsonl or json (either gzipped), or parquet, in the layouts of the known sets.

By a record's keys: `question_id, category, turns, reference` (MT-Bench, Spec-Bench, SPEED-Bench and what peers made of
the others), `task_id, prompt` (HumanEval), `question, answer` (gsm8k; also with a `context`), `instruction, input,
output` (Alpaca).
HumanEval's prompt is the beginning of a program, which a chat model would answer with talk, so it is wrapped in an
instruction to complete the function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.data.records import Broken, read_values
from specflow.errors import UserError

_COMPLETE = "Complete the following Python function.\n\n```python\n{prompt}\n```"
_LAYOUTS = (
    "question_id, category, turns (MT-Bench, Spec-Bench, SPEED-Bench), task_id, prompt (HumanEval), question, answer "
    "(gsm8k) or instruction, input, output (Alpaca)"
)
_WITHHELD = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""How SPEED-Bench's public file marks texts that it may not pass on."""
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Program:
    """How a HumanEval answer is judged."""

    prompt: str
    """Beginning of the program: imports, signature, docstring."""
    test: str
    """Defines check(candidate)."""
    entry_point: str


@dataclass(frozen=True)
class Question:
    question_id: str
    category: str
    turns: list[str]
    reference: list[str] | None = None
    program: Program | None = None


def read_prompt_set(name: str, path: Path) -> list[Question]:
    """Questions of the prompt set `name`, whose name is the category of questions without one.

    A folder (a hub snapshot) must hold one file of questions. Raises UserError with the line, or the record where a
    file has no lines, for what is unreadable, of another layout, without a turn, or there twice.
    """
    path = _only_file(name, path) if path.is_dir() else path
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for place, record in _records(name, path):
        where = f"prompt set {name}: {path} {place}"
        question = _question(record, name, len(questions), where)
        if question.question_id in seen:
            raise UserError(
                f"{where} has the id {question.question_id!r} of {seen[question.question_id]}: give each its own"
            )
        seen[question.question_id] = place
        questions.append(question)
    if not questions:
        raise UserError(f"prompt set {name}: {path} has no question: name another file")
    return questions


def _only_file(name: str, folder: Path) -> Path:
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(_SUFFIXES))
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in files[:4]) or "none"
        raise UserError(
            f"prompt set {name}: {folder} has {len(files)} files of questions ({found}): name one, as in "
            "hf:org/name@<commit>/path or file:path"
        )
    return files[0]


def _records(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file as the user counts it, record) of each."""
    try:
        yield from read_values(path)
    except Broken as broken:
        raise UserError(
            f"prompt set {name}: {path} {broken.where} cannot be read ({broken.reason}): expected jsonl, json, csv (or "
            ".gz of these), or parquet"
        ) from None
    except UserError as error:
        raise UserError(f"prompt set {name}: {error}") from None


def _question(record: Any, name: str, number: int, where: str) -> Question:
    """A record in one of the layouts; `number` is the id of one that has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}, expected an object with question_id and turns")
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate): correct its text") from None
    if "task_id" in record:
        question = _human_eval(record, where)
    elif "turns" in record or "question_id" in record:
        question = _turns(record, name, where)
    elif {"question", "answer"} <= record.keys():
        question = _answered(record, number, where)
    elif "instruction" in record:
        question = _alpaca(record, name, number, where)
    else:
        raise UserError(f"{where} has the keys {', '.join(map(str, record))[:80] or 'none'}: expected {_LAYOUTS}")
    if any(_WITHHELD in turn for turn in question.turns):
        raise UserError(
            f"{where} is a placeholder of SPEED-Bench, not a question: make the whole file with the set's own prepare "
            "script and name that"
        )
    return question


def _answered(record: dict[str, Any], number: int, where: str) -> Question:
    (question,) = _texts(record["question"], "question", where)
    (passage,) = _texts(record.get("context") or "", "context", where, may_be_empty=True)
    turn = f"{question}\n\n{passage}" if passage.strip() else question
    return Question(_id(record, number), "math", [turn], [str(record["answer"])])


def _id(record: dict[str, Any], number: int) -> str:
    return str(record.get("id", number))


def _human_eval(record: dict[str, Any], where: str) -> Question:
    prompt = _texts(record.get("prompt"), "prompt", where)[0]
    solution, test, entry = (record.get(key) for key in ("canonical_solution", "test", "entry_point"))
    return Question(
        str(record["task_id"]),
        "coding",
        [_COMPLETE.format(prompt=prompt.rstrip())],
        [solution] if isinstance(solution, str) else None,
        Program(prompt, test, entry) if isinstance(test, str) and isinstance(entry, str) else None,
    )


def _turns(record: dict[str, Any], name: str, where: str) -> Question:
    for key in ("question_id", "turns"):
        if record.get(key) is None:
            raise UserError(f"{where} lacks {key!r}: expected {_LAYOUTS}")
    if not isinstance(record["turns"], list):
        raise UserError(f"{where}: 'turns' is {record['turns']!r:.40}, expected a list of texts")
    reference = record.get("reference")
    return Question(
        str(record["question_id"]),
        str(record.get("category") or name),
        _texts(record["turns"], "turns", where),
        None if reference is None else _texts(reference, "reference", where, may_be_empty=True),
    )


def _alpaca(record: dict[str, Any], name: str, number: int, where: str) -> Question:
    (instruction,) = _texts(record["instruction"], "instruction", where)
    given, output = record.get("input") or "", record.get("output")
    (given,) = _texts(given, "input", where, may_be_empty=True)
    return Question(
        _id(record, number),
        str(record.get("category") or name),
        [f"{instruction}\n\n{given}" if given.strip() else instruction],
        [output] if isinstance(output, str) else None,
    )


def _texts(value: Any, key: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and (may_be_empty or text.strip()) for text in texts):
        raise UserError(f"{where}: {key!r} holds an empty or non-text entry: expected texts")
    if not texts and not may_be_empty:
        raise UserError(f"{where}: {key!r} is empty: expected at least one text")
    return texts
