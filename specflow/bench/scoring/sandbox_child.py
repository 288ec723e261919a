"""The two processes that judge an answer, started by sandbox.py; both confined, standard library only.

The program's process runs the answer and is told nothing of the tests. The judge's process runs the tests, which call
the answer's function over two pipes, by value: no code of the answer runs where the verdict is reached.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import sys
import traceback
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

from specflow.bench.scoring.confinement import confine

LARGEST_MESSAGE = 64 << 20
_PLAIN: dict[type, Any] = {int: int.__int__, float: float.__float__, str: str.__str__}
_BY_TEXT: dict[str, Any] = {"complex": complex, "Decimal": Decimal, "Fraction": Fraction}
_BY_ITEMS: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "range": lambda ends: range(*ends),
    "dict": dict,
}


def encode(value: Any) -> Any:
    """A value as JSON, each type but JSON's own by its name; subclasses become what they derive from.

    Raises TypeError for what has no value to pass: functions, generators, objects of the answer's own classes.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _PLAIN.items():
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, container in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, container):
            return {name: [encode(item) for item in value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    for name, number in _BY_TEXT.items():
        if isinstance(value, number):
            return {name: str(value)}
    raise TypeError(f"a value of type {type(value).__name__} cannot be passed between the answer and its tests")


def decode(raw: Any) -> Any:
    """The value that `encode` was given; raises ValueError for anything else."""
    if isinstance(raw, list):
        return [decode(item) for item in raw]
    if not isinstance(raw, dict):
        return raw
    [(name, inner)] = raw.items()
    if name == "bytes":
        return bytes.fromhex(inner)
    if name in _BY_TEXT:
        return _BY_TEXT[name](inner)
    return _BY_ITEMS[name](decode(inner))


class Broken(BaseException):
    """The answer's process can no longer be asked; not an Exception, which tests may expect and swallow."""


class Answer:
    """In the judge's process: the answer's function, to be called like the function itself."""

    def __init__(self, calls: int, results: int) -> None:
        self._calls, self._results = os.fdopen(calls, "wb"), os.fdopen(results, "rb")
        self.broken: str | None = None
        """Why it cannot have passed, whatever the tests say."""
        if self._results.readline(LARGEST_MESSAGE) != b'"confined"\n':
            raise OSError("the answer's process could not be confined")

    def define(self, source: str, entry_point: str) -> None:
        """Let the answer run to its end. Raises what it raised."""
        self._ask({"source": source, "entry_point": entry_point})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            message = {"args": encode(args), "kwargs": encode(kwargs)}
        except TypeError as error:
            self.broken = str(error)
            raise Broken from None
        return self._ask(message)

    def _ask(self, message: dict[str, Any]) -> Any:
        if self.broken is None:
            try:
                self._calls.write(json.dumps(message).encode() + b"\n")
                self._calls.flush()
                line = self._results.readline(LARGEST_MESSAGE)
                if not line:
                    raise BrokenPipeError
                reply = json.loads(line)
                if "value" in reply:
                    return decode(reply["value"])
                name, text = map(str, reply["raised"])
            except OSError:
                self.broken = "the answer ended before its tests did"
            except (ValueError, TypeError, KeyError, RecursionError, MemoryError, ArithmeticError):
                self.broken = "the answer's process sent what is no value"
            else:
                if name == "unpassable":
                    self.broken = text
                else:
                    raise _exception(name, text)
        raise Broken(self.broken)


def _exception(name: str, text: str) -> Exception:
    """What the answer raised, where it is one of Python's own that a text alone makes."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {text}")


def judge(task: dict[str, Any], calls: int, results: int) -> dict[str, str]:
    """Run the tests of `task` (source, prompt, test, entry_point) against the answer: {status, detail}."""
    try:
        answer = Answer(calls, results)
    except OSError as error:
        return {"status": "unconfined", "detail": str(error)}
    try:
        answer.define(task["source"], task["entry_point"])
        names: dict[str, Any] = {"__name__": "tests"}
        with contextlib.suppress(SyntaxError):  # the beginning of a body is no program
            exec(compile(task["prompt"], "prompt.py", "exec", dont_inherit=True), names)
        names[task["entry_point"]] = answer  # some tests compare the function with itself
        exec(compile(task["test"], "tests.py", "exec", dont_inherit=True), names)
        names["check"](answer)
    except Broken:
        pass
    except BaseException as error:
        return {"status": "failed", "detail": traceback.format_exception_only(error)[-1].strip()[:200]}
    return {"status": "failed" if answer.broken else "passed", "detail": answer.broken or ""}


def serve(calls: int, results: int) -> None:
    """In the answer's process: define the function, then call it as often as it is asked for."""
    asked, told = os.fdopen(calls, "rb"), os.fdopen(results, "wb")

    def tell(message: Any) -> None:
        told.write(json.dumps(message).encode() + b"\n")
        told.flush()

    tell("confined")
    module = sys.modules["answer"] = ModuleType("answer")
    function: Any = None
    for line in asked:
        message = json.loads(line)
        try:
            if "source" in message:
                exec(compile(message["source"], "answer.py", "exec", dont_inherit=True), module.__dict__)
                function, value = vars(module).get(message["entry_point"]), None
                if function is None:
                    raise NameError(f"the answer defines no {message['entry_point']}")
            else:
                value = function(*decode(message["args"]), **decode(message["kwargs"]))
        except BaseException as error:
            known = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            text = error.args[0] if known is KeyError and error.args else error
            tell({"raised": [known.__name__, str(text)[:1000]]})
            continue
        try:
            reply = {"value": encode(value)}
        except (TypeError, RecursionError) as error:
            reply = {"raised": ["unpassable", str(error)]}
        tell(reply)


def restrict(limits: dict[str, list[int]]) -> None:
    """Limits first: setting them is no call that the boundary allows."""
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    confine()


def main() -> None:
    role, limits, *pipes = sys.argv[1:]
    ours = [os.dup(number) for number in (0, 1)]  # kept from what an answer or a test prints and reads
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    sys.argv, sys.path = [""], sys.path[1:]  # the standard library alone
    sys.set_int_max_str_digits(0)
    if role == "program":
        restrict(json.loads(limits))
        serve(*ours)
        return
    with os.fdopen(ours[0], "rb") as given:
        task = json.load(given)
    try:
        restrict(json.loads(limits))
    except OSError as error:
        verdict = {"status": "unconfined", "detail": str(error)}
    else:
        verdict = judge(task, *map(int, pipes))
    os.write(ours[1], json.dumps(verdict).encode())


if __name__ == "__main__":
    main()
