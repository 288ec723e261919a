"""The sandbox: what passes, what does not, what crosses between an answer and its tests, and where nothing may run.

What tries to get out of it is in tests/attacks/sandbox.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest

from specflow.bench.scoring import confinement
from specflow.bench.scoring import sandbox as sandbox_module
from specflow.bench.scoring.sandbox import Limits, Outcome, Sandbox
from specflow.bench.scoring.sandbox_child import decode, encode
from specflow.data.prompt_sets import Program
from specflow.errors import UserError
from tests import ROOT

LIMITS = Limits(wall_s=60.0, cpu_s=2, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if lack := confinement.missing():
        pytest.skip(lack)
    return Sandbox.open(LIMITS)


def run(sandbox: Sandbox, source: str, *tests: str, prompt: str = "") -> Outcome:
    body = "\n    ".join(tests)
    return sandbox.run(source, Program(prompt, f"def check(candidate):\n    {body}\n", "f"))


def test_right_and_wrong_answers(sandbox: Sandbox) -> None:
    double = "def f(x):\n    return 2 * x"
    passed = run(sandbox, double, "assert candidate(2) == 4", "assert candidate('a') == 'aa'")
    assert (passed.status, passed.detail) == ("passed", "")
    wrong = run(sandbox, double, "assert candidate(2) == 5, 'five'")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError: five")
    assert run(sandbox, "x = (", "pass").detail == "SyntaxError: '(' was never closed (answer.py, line 1)"
    assert run(sandbox, "import numpy_of_nobody", "pass").detail.startswith("ModuleNotFoundError: No module named")
    assert run(sandbox, "def g(): pass", "pass").detail == "NameError: the answer defines no f"
    assert run(sandbox, "def f(): return {}['a']", "candidate()").detail == "KeyError: 'a'"


def test_tests_see_the_beginning_and_the_function_by_its_name(sandbox: Sandbox) -> None:
    """As HumanEval's do: a helper of the prompt, and the function compared with itself."""
    prompt = 'import math\ndef helper(x):\n    return x + 1\n\ndef f(x):\n    """Helps."""\n'
    answer = prompt + "    return helper(x)"
    assert (
        run(sandbox, answer, "assert f(1) == candidate(1) == helper(1) == math.ceil(1.5)", prompt=prompt).status
        == "passed"
    )
    forged = answer + "\ndef helper(x):\n    return 9\n"
    assert run(sandbox, forged, "assert candidate(1) == helper(1)", prompt=prompt).status == "failed"


def test_exceptions_cross_by_their_builtin_type(sandbox: Sandbox) -> None:
    answer = (
        "class Mine(ValueError): pass\n"
        "def f(x):\n    if x: raise Mine('no')\n    raise UnicodeDecodeError('utf-8', b'', 0, 1, 'bad')"
    )
    expects = ("try: candidate(1)", "except ValueError as e: assert str(e) == 'no'", "else: assert False")
    assert run(sandbox, answer, *expects).status == "passed"
    assert run(sandbox, answer, "candidate(0)").detail.startswith("RuntimeError: UnicodeDecodeError: 'utf-8' codec")


def test_a_lost_answer_is_no_exception_that_tests_may_expect(sandbox: Sandbox) -> None:
    expects = ("try: candidate(1)", "except: return", "assert False")
    assert run(sandbox, "def f(x): raise ValueError", *expects).status == "passed"
    lost = run(sandbox, "import os\ndef f(x): os._exit(0)", *expects)
    assert (lost.status, lost.detail) == ("failed", "the answer ended before its tests did")
    unpassable = run(sandbox, "def f(x): return (x for x in 'a')", *expects)
    assert unpassable.detail == "a value of type generator cannot be passed between the answer and its tests"


def test_limits(sandbox: Sandbox) -> None:
    assert run(sandbox, "while True: pass", "pass").detail == "after 2 s of CPU time"
    brief = Sandbox(Limits(wall_s=3.0))
    assert run(brief, "import time; time.sleep(60)", "pass").status == "timeout"
    assert run(sandbox, "kept = bytearray(64 << 20)\ndef f(): pass", "candidate()").status == "passed"
    assert run(sandbox, "kept = bytearray(512 << 20)", "pass").detail == "MemoryError"


Point = namedtuple("Point", "x y")


class Level(IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value",
    [
        None, True, 10**4000, -0.5, math.inf, "a\ud800\n", b"\x00\xff", 1 + 2j, Decimal("1.10"), Fraction(1, 3),
        range(1, 9, 2), (), (1, [2.0, {3: (4,)}]), {1, (2, 3)}, frozenset("ab"), {"tuple": [1]}, {(1, 2): {"a": None}},
    ],
)  # fmt: skip
def test_values_cross_as_they_are(value: Any) -> None:
    found = decode(encode(value))
    assert found == value and type(found) is type(value)


def test_subclasses_cross_as_what_they_derive_from() -> None:
    class Equal(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    for value, plain in [
        (Equal(3), 3), (Level.HIGH, 3), (Point(1, 2), (1, 2)), (Counter("aa"), {"a": 2}), (OrderedDict(a=1), {"a": 1}),
        (bytearray(b"x"), b"x"),
    ]:  # fmt: skip
        found = decode(encode(value))
        assert type(found) is type(plain) and found == plain
    assert math.isnan(decode(encode(math.nan)))
    for value in (print, object(), int, iter([])):
        with pytest.raises(TypeError, match="cannot be passed between the answer and its tests"):
            encode(value)


def test_a_machine_without_the_boundary_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A confined process is such a machine: the boundary grants it no second one."""
    if lack := confinement.missing():
        with pytest.raises(UserError, match="no boundary can be put around them here"):
            Sandbox.open()
        pytest.skip(lack)
    code = "from specflow.bench.scoring import confinement as c; c.confine(); print(c.missing())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "grants no Landlock (Operation not permitted): use Linux 5.13 or newer" in run.stdout
    monkeypatch.setattr(sandbox_module, "missing", lambda: run.stdout.strip())
    with pytest.raises(UserError) as caught:
        Sandbox.open()
    assert str(caught.value).endswith("; or leave the set out of accuracy") and "\n" not in str(caught.value)


def test_other_systems_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise OSError

    if confinement.missing() is None:
        monkeypatch.setattr(confinement, "_seccomp", no_library)
        assert str(confinement.missing()).startswith("libseccomp is not installed: install the system's package")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(confinement.missing()).startswith("it needs 64-bit Linux")


def test_a_sandbox_in_which_nothing_passes_is_one_line(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match=r"a harmless program ended with timeout \(after 0.01 s\)"):
        Sandbox.open(Limits(wall_s=0.01))


def test_it_says_what_it_does(sandbox: Sandbox) -> None:
    said = "; ".join(sandbox.describe())
    assert "at most 60 s (2 s of CPU) and 256 MiB of memory" in said
    assert "nor start processes or threads, nor reach a network" in said
