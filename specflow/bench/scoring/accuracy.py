"""Whether answers are right, with the draft as without it: gsm8k by its final number, HumanEval by running its tests.

Questions are asked as they stand, without examples before them, so the rates do not compare with published ones; what
counts is the paired difference. Greedy decoding that is lossless has none; under sampling it should not leave chance.
"""

from __future__ import annotations

import ast
import logging
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from specflow.bench.scoring.sandbox import Sandbox
from specflow.bench.statistics.intervals import difference_interval
from specflow.bench.statistics.records import BASELINE, DRAFT, Record, paired
from specflow.data.prompt_sets import Program, Question
from specflow.errors import UserError
from specflow.results.schema import Accuracy

logger = logging.getLogger(__name__)

NUMBER, TESTS = "final number", "tests"
"""Ways to score: does the final number equal the reference's; do the question's tests pass."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus after a digit, letter or bracket is an operator: "12-5" ends in 5, "(-5)" in -5.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])-(?=[$€£\d.]))?(?:[$€£]\s?(?P<minus>-)?)?(?P<over>{_DIGITS})(?:\s?/\s?(?P<under>\d+))?"
)
_SAID = re.compile(r"answer\b[^.\n\d]{0,40}?(?:\bis\b|:|=)", re.IGNORECASE)
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Score:
    """One answer judged."""

    correct: bool
    got: str | None
    """The number or the outcome of the tests; None where the answer holds nothing to judge."""
    expected: str
    detail: str = ""
    """Why a program failed, one line."""


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends in: the first behind its last `####`, else behind its last "answer is" on that
    line, else the last of all. Currency, thousands and percent signs count for nothing; 3/4 and \\frac{3}{4} are 0.75.
    """
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$")
    text = re.sub(r"\\d?frac\s*{(\d+)}\s*{(\d+)}", r"\1/\2", text)
    places = [text.rpartition("####")[2]] if "####" in text else []
    places += [text[found.end() :].split("\n", 1)[0] for found in list(_SAID.finditer(text))[-1:]]
    for place in places:
        if found := _NUMBER.search(place):
            return _value(found)
    every = list(_NUMBER.finditer(text))
    return _value(every[-1]) if every else None


def _value(found: re.Match[str]) -> Fraction:
    value = Fraction(found["over"].replace(",", ""))
    if found["under"] and int(found["under"]):
        value /= int(found["under"])
    return -value if found["sign"] or found["minus"] else value


def number_reference(question: Question, turn: int) -> str | None:
    """The reference answer of a turn where it is one in gsm8k's form, which ends in `#### number`."""
    answers = question.reference or []
    told = answers[turn] if turn < len(answers) else ""
    return told if "####" in told and final_number(told) is not None else None


def score_number(text: str, reference: str) -> Score:
    expected, got = final_number(reference), final_number(text)
    assert expected is not None, "checked by number_reference()"
    return Score(got == expected, None if got is None else _shown(got), _shown(expected))


def _shown(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):g}"


def program_of(text: str, program: Program) -> str | None:
    """A program that defines the function, from an answer: its code and the beginning. None where it holds no code.

    An answer repeats the function in a fenced block (even one that the token limit cut off) or as bare text, or it only
    continues the function's body. What the beginning defines besides (imports, helpers) stays defined.
    """
    blocks = [block for block in _FENCE.findall(text) if block.strip()]
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(program.entry_point)}\s*\(", re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0] if blocks else text)
    if defines.search(code):
        code = textwrap.dedent(code)
        code = code if blocks else _bare_code(code)
        beginning = program.prompt if _compiles(program.prompt) else ""
        source = f"{beginning}\n{code}"
    elif blocks or text.lstrip("\n")[:1] in (" ", "\t"):
        source = program.prompt.rstrip("\n") + "\n" + _body(code)
    else:
        return None
    return source + "\n"


def _bare_code(text: str) -> str:
    """Code from the first line that looks like it up to where it stops being Python."""
    lines = text.split("\n")
    begins = re.compile(r"(?:async\s+)?def |import |from \w+ import |class |@")
    first = next((i for i, line in enumerate(lines) if begins.match(line)), 0)
    for end in range(len(lines), first, -1):
        if _compiles("\n".join(lines[first:end])):
            return "\n".join(lines[first:end])
    return "\n".join(lines[first:])


def _body(code: str) -> str:
    """The continuation of a function: indented, and cut off where the function ends."""
    lines = code.strip("\n").split("\n")
    if lines[0] == lines[0].lstrip():
        return textwrap.indent("\n".join(lines), "    ")
    kept = next((i for i, line in enumerate(lines) if line.strip() and line == line.lstrip()), len(lines))
    return "\n".join(lines[:kept])


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return False
    return True


def score_program(text: str, program: Program, sandbox: Sandbox) -> Score:
    source = program_of(text, program)
    if source is None:
        return Score(False, None, "passed", "no code in the answer")
    outcome = sandbox.run(source, program)
    return Score(outcome.status == "passed", outcome.status, "passed", outcome.detail)


def check_scorable(
    sets: Mapping[str, Sequence[Question]], names: Sequence[str], *, execute_code: bool
) -> Sandbox | None:
    """The sandbox, where a prompt set to be scored needs one. To be called before anything is measured.

    Raises UserError where a set has nothing to score by, or only code that may not be run or cannot be here.
    """
    for name in names:
        if _kind(sets[name]) is None:
            raise UserError(
                f"prompt set {name} cannot be scored: no question has a reference that ends in '#### number' (gsm8k) "
                "or test and entry_point (HumanEval); leave it out of accuracy"
            )
        if _kind(sets[name]) == TESTS and not execute_code:
            raise UserError(
                f"prompt set {name} is scored by running the code that the model writes: set execute_code true to "
                "allow that, or leave the set out of accuracy"
            )
    return Sandbox.open() if any(_kind(sets[name]) == TESTS for name in names) else None


def _kind(questions: Sequence[Question]) -> str | None:
    if any(question.program is not None for question in questions):
        return TESTS
    turns = ((question, turn) for question in questions for turn in range(len(question.turns)))
    return NUMBER if any(number_reference(question, turn) is not None for question, turn in turns) else None


def accuracy(
    records: Sequence[Record],
    sets: Mapping[str, Sequence[Question]],
    names: Sequence[str],
    text_of: Callable[[Record], str],
    *,
    execute_code: bool,
) -> tuple[dict[str, Accuracy] | None, list[dict[str, Any]]]:
    """summary.json's `accuracy` by prompt set, and one row for each judged answer. (None, []) where no set is named.

    `text_of` gives an answer's text. Runs programs of the model's where `execute_code` allows, and says so first.
    """
    sandbox = check_scorable(sets, names, execute_code=execute_code)
    if sandbox is not None:
        logger.warning("accuracy: running programs that the model wrote: %s", "; ".join(sandbox.describe()))
    block: dict[str, Accuracy] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        chosen = [record for record in records if record.set == name and record.engine in (BASELINE, DRAFT)]
        scores = _score(chosen, {question.question_id: question for question in sets[name]}, text_of, sandbox)
        kind = _kind(sets[name])
        assert kind is not None, "check_scorable has seen it"
        block[name] = compare(chosen, scores, kind=kind)
        rows += [{"id": r.key, "kind": kind, **asdict(scores[r.key])} for r in chosen if r.key in scores]
    return block or None, rows


def _score(
    records: Sequence[Record],
    questions: Mapping[str, Question],
    text_of: Callable[[Record], str],
    sandbox: Sandbox | None,
) -> dict[str, Score]:
    """Scores by the records' keys; equal answers, which greedy repeats are, are judged once."""
    judged: dict[tuple[str, int, tuple[int, ...]], Score | None] = {}
    scores = {}
    for record in records:
        answer = (record.question_id, record.turn, tuple(record.token_ids))
        if answer not in judged:
            judged[answer] = _judge(text_of(record), questions[record.question_id], record.turn, sandbox)
        if (score := judged[answer]) is not None:
            scores[record.key] = score
    return scores


def _judge(text: str, question: Question, turn: int, sandbox: Sandbox | None) -> Score | None:
    """None where this turn has nothing to be held against."""
    if question.program is not None and turn == 0:
        assert sandbox is not None, "opened for sets with programs"
        return score_program(text, question.program, sandbox)
    reference = number_reference(question, turn)
    return None if reference is None else score_number(text, reference)


def compare(records: Sequence[Record], scores: Mapping[str, Score], *, kind: str) -> Accuracy:
    """Rates of right answers of both engines, and the paired difference (draft - baseline) with its 95 % interval."""
    sides = {e: [r for r in records if r.engine == e and r.key in scores] for e in (BASELINE, DRAFT)}
    baseline, draft = sides.values()

    def rate(chosen: Sequence[Record]) -> float | None:
        return sum(scores[r.key].correct for r in chosen) / len(chosen) if chosen else None

    pairs = [(b.question, scores[b.key].correct, scores[d.key].correct) for b, d in paired(baseline, draft)]
    differences = [(question, float(theirs) - float(ours)) for question, ours, theirs in pairs]
    return Accuracy(
        kind=kind,
        num_questions=len({r.question for r in [*baseline, *draft]}),
        num_answers=len(pairs),
        baseline=rate(baseline),
        draft=rate(draft),
        difference=sum(value for _, value in differences) / len(differences) if differences else None,
        difference_ci=difference_interval(differences),
        only_baseline_right=sum(ours and not theirs for _, ours, theirs in pairs),
        only_draft_right=sum(theirs and not ours for _, ours, theirs in pairs),
        num_unreadable={e: sum(scores[r.key].got is None for r in chosen) for e, chosen in sides.items()},
        num_length_limited={e: sum(r.finish_reason == "length" for r in c) for e, c in sides.items()},
    )
