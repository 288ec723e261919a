"""Scoring answers: numbers, programs, and the paired difference between the two engines."""

from __future__ import annotations

import dataclasses
import logging
from fractions import Fraction
from typing import Any

import pytest

from specflow.bench.scoring import accuracy as scoring
from specflow.bench.scoring import sandbox as sandbox_module
from specflow.bench.scoring.accuracy import (
    accuracy,
    check_scorable,
    final_number,
    program_of,
    score_number,
    score_program,
)
from specflow.bench.scoring.confinement import missing
from specflow.bench.scoring.sandbox import Sandbox
from specflow.bench.statistics.records import Record
from specflow.data.prompt_sets import Program, Question
from specflow.errors import UserError
from tests.bench_records import record


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("18 - 3 = 15\n#### $1,234.50", 1234.5),
        ("#### 3\nWait.\n#### 4 dollars", 4),
        ("The answer is 72.", 72),
        ("The answer is: **$18**. It was 20 before.", 18),
        ("Therefore the answer to this question is 5 apples, not 6.", 5),
        ("Final answer: 7\nBecause 3 + 4 = 7 and 9 is too many", 7),
        ("The answer is unclear.\nIt could be 9", 9),
        ("She has 3 + 4 = 7 apples left, i.e. 7.0", 7),
        ("so she pays 12-5", 5),
        ("the temperature is -5 degrees", -5),
        ("a loss of (-5)", -5),
        ("a loss of -$5", -5),
        ("$-5", -5),
        ("a loss of \u22123", -3),
        ("- 5 apples", 5),
        ("it rose by 50%", 50),
        ("it is 3/4 of them", 0.75),
        ("\\frac{3}{4}", 0.75),
        ("\\boxed{1{,}000}", 1000),
        ("that costs \\$1,000,000 in all", 1000000),
        ("1, 2 and 3", 3),
        ("1,2", 2),
        (".5", 0.5),
        ("18.", 18),
        ("1/0", 1),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(str(number)))


def test_numbers_are_compared_by_value() -> None:
    assert score_number("It costs $1,250.00.", "250 * 5 = <<250*5=1250>>1250\n#### 1250").correct
    wrong = score_number("It costs 1,251", "#### 1250")
    assert (wrong.correct, wrong.got, wrong.expected) == (False, "1251", "1250")
    silent = score_number("I do not know.", "#### 0.5")
    assert (silent.correct, silent.got, silent.expected) == (False, None, "0.5")


PROMPT = '''from typing import List


def double(x: int) -> int:
    return 2 * x


def total(xs: List[int]) -> int:
    """Twice the sum.
    >>> total([1, 2])
    6
    """
'''
PROGRAM = Program(
    PROMPT, "def check(candidate):\n    assert candidate([1, 2]) == 6\n    assert candidate([]) == 0", "total"
)
WHOLE = "def total(xs: List[int]) -> int:\n    return double(sum(xs))\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if lack := missing():
        pytest.skip(lack)
    return Sandbox.open()


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (f"Sure:\n```python\n{WHOLE}```\nIt doubles the sum.", True),
        (f"```\n{WHOLE}```", True),
        (f"```python\n{PROMPT}    return 2 * sum(xs)\n```", True),
        (f"```python\n{WHOLE}", True),  # the token limit cut the fence off
        (f"```python\nprint(total([1]))\n```\nthat is\n```python\n{WHOLE}```", True),
        (f"Here it is.\n\n{WHOLE}\nIt doubles the sum, as you can see.", True),
        ("    return double(sum(xs))\n", True),
        ("\n\n    return double(sum(xs))\n", True),
        ("    y = sum(xs)\n    return 2 * y\n\nprint('and', 'more'\n", True),
        ("```python\nreturn double(sum(xs))\n```", True),
        ("```python\n    return double(sum(xs))\n```", True),
        (f"```python\n{WHOLE.replace('double(sum(xs))', 'sum(xs)')}```", False),
        ("```python\ndef total(xs):\n    return 6\n```", False),
        ("```python\ndef total(xs):\n    import sys; sys.exit(0)\n```", False),
        ("The function should double the sum.", False),
        ("", False),
    ],
)
def test_programs(answer: str, right: bool, sandbox: Sandbox) -> None:
    assert score_program(answer, PROGRAM, sandbox).correct is right


def test_outcomes_of_programs(sandbox: Sandbox) -> None:
    none = score_program("I cannot help with that.", PROGRAM, sandbox)
    assert (none.got, none.detail) == (None, "no code in the answer")
    wrong = score_program("```python\ndef total(xs):\n    return 12 / len(xs)\n```", PROGRAM, sandbox)
    assert wrong.got == "failed" and wrong.detail == "ZeroDivisionError: division by zero"
    source = program_of(f"```python\n{WHOLE}```", PROGRAM)
    assert source == f"{PROMPT}\n{WHOLE}\n", "and nothing of the tests"


GSM = [Question(f"g{i}", "math", ["How many?"], [f"so\n#### {i}"]) for i in range(3)]
CODE = [Question("c0", "coding", ["Complete it."], [WHOLE], PROGRAM)]
PLAIN = [Question("p0", "writing", ["Write.", "Again."], ["A poem about 3 cats"])]


def answers(engine: str, right: tuple[bool, ...], *, repeat: int = 0) -> list[Record]:
    """gsm8k answers of one token: 100 plus the right number, or 0."""
    rows = []
    for i, correct in enumerate(right):
        row = record([], engine=engine, question=f"g{i}", repeat=repeat, tokens=[100 + i if correct else 0], set="gsm")
        rows.append(row)
    return rows


def text_of(row: Record) -> str:
    return f"The answer is {row.token_ids[0] - 100}."


def test_paired_difference() -> None:
    """Baseline right on 0, 1, 2 and the draft on 1 and 2 in one of two repeats: 6/6 against 5/6."""
    records = [
        *answers("baseline", (True, True, True)),
        *answers("baseline", (True, True, True), repeat=1),
        dataclasses.replace(answers("draft", (False,))[0], finish_reason="stop"),
        *answers("draft", (False, True, True))[1:],
        *answers("draft", (True, True, True), repeat=1),
        *answers("oracle", (True, True, True)),
    ]
    block, rows = accuracy(records, {"gsm": GSM}, ["gsm"], text_of, execute_code=False)
    assert block is not None
    found = block["gsm"]
    assert found.kind == "final number"
    assert (found.num_questions, found.num_answers, found.baseline) == (3, 6, 1.0)
    assert found.draft == pytest.approx(5 / 6) and found.difference == pytest.approx(-1 / 6)
    assert (found.only_baseline_right, found.only_draft_right) == (1, 0)
    assert found.num_length_limited == {"baseline": 6, "draft": 5}
    # questions' differences (-1/2, 0, 0): mean -1/6, standard error 1/6, t of 2 degrees of freedom 4.303
    assert found.difference_ci == pytest.approx((-1 / 6 - 4.303 / 6, -1 / 6 + 4.303 / 6), abs=1e-3)
    assert len(rows) == 12 and rows[6] == {
        "id": "gsm/g0/0/0/0/draft", "kind": "final number", "correct": False, "got": "-100", "expected": "0",
        "detail": "",
    }  # fmt: skip


def test_one_engine_alone_has_a_rate_and_no_difference() -> None:
    block, _ = accuracy(answers("draft", (True, False, False)), {"gsm": GSM}, ["gsm"], text_of, execute_code=False)
    assert block is not None and block["gsm"].baseline is None is block["gsm"].difference
    assert block["gsm"].draft == pytest.approx(1 / 3) and block["gsm"].num_unreadable == {
        "baseline": 0,
        "draft": 0,
    }
    assert accuracy([], {"gsm": GSM}, [], text_of, execute_code=False) == (None, [])


def test_programs_run_only_when_allowed_and_equal_answers_once(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        record([], engine=engine, question="c0", repeat=repeat, tokens=[1], set="code")
        for engine in ("baseline", "draft")
        for repeat in range(3)
    ]
    runs: list[str] = []

    def run(self: Sandbox, source: str, program: Program) -> Any:
        if program is PROGRAM:
            assert "programs that the model wrote" in caplog.text, "it says so before the first one"
            runs.append(source)
        return plain_run(self, source, program)

    plain_run = Sandbox.run
    monkeypatch.setattr(scoring.Sandbox, "run", run)
    arguments: Any = (records, {"code": CODE}, ["code"], lambda row: f"```python\n{WHOLE}```")
    with pytest.raises(UserError, match="set execute_code true"):
        accuracy(*arguments, execute_code=False)
    assert not runs
    with caplog.at_level(logging.WARNING):
        block, rows = accuracy(*arguments, execute_code=True)
    assert len(runs) == 1 and len(rows) == 6
    assert block is not None and (block["code"].kind, block["code"].draft) == ("tests", 1.0)
    assert "at most 10 s" in caplog.text


def test_what_cannot_be_scored_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_scorable({"gsm": GSM, "code": CODE}, ["gsm"], execute_code=False)
    monkeypatch.setattr(sandbox_module, "missing", lambda: "the kernel grants no Landlock")
    with pytest.raises(UserError, match="no boundary can be put around them here: the kernel grants no Landlock; or"):
        check_scorable({"code": CODE}, ["code"], execute_code=True)
    with pytest.raises(UserError, match="prompt set writing cannot be scored"):
        check_scorable({"writing": PLAIN}, ["writing"], execute_code=True)
    unlike = [Question("q", "math", ["How many?"], ["#### many"])]
    with pytest.raises(UserError, match="cannot be scored"):
        check_scorable({"x": unlike}, ["x"], execute_code=False)
