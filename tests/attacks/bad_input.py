"""A bad input, the command that meets it, and how that must end: one line and exit code 2, or a right result."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import yaml

from specflow.tracking.store import open_store
from tests import ROOT
from tests.toys import make_project_inputs, tiny_params


@dataclass(frozen=True)
class BadInput:
    """One way in which a project's inputs are wrong."""

    kind: str
    """What is wrong: settings, data, prompt set, target, draft."""
    name: str
    damage: Callable[[Path], None]
    """Spoils a project folder that was fine."""
    command: tuple[str, ...]
    """Arguments of `specflow` that meet it first."""
    words: tuple[str, ...] = ()
    """Words that the line must have, so that it is about this fault; empty: the command must succeed."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int
    stderr: str
    new_files: list[str]
    """Files that it left in `artifacts`."""

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return self.stderr.strip().rsplit("\n", 1)[-1]


def run_specflow(folder: Path, *arguments: str) -> Ending:
    """Run a command of `specflow` in this process, in `folder`; an exception that escapes is exit code 1."""
    from specflow.cli import main

    before = _files(folder)
    stderr = io.StringIO()
    code = 0
    with (
        chdir(folder),
        patch("sys.argv", ["specflow", *arguments]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception as error:  # what the interpreter would print as a traceback
            code = 1
            print(f"Traceback: {type(error).__name__}: {error}", file=stderr)
    return Ending(code, stderr.getvalue(), sorted(_files(folder) - before))


def fault(bad: BadInput, folder: Path) -> str:
    """Damage the project in `folder` and run the command; what is wrong with the ending, or ""."""
    bad.damage(folder)
    ending = run_specflow(folder, *bad.command)
    if not bad.words:
        return "" if ending.code == 0 else f"exit code {ending.code}: {ending.stderr}"
    if ending.code != 2 or "Traceback" in ending.stderr:
        return f"exit code {ending.code}: {ending.stderr}"
    if not ending.line.startswith("specflow: "):
        return f"the last line is no error: {ending.stderr}"
    missing = [word for word in bad.words if word.lower() not in ending.line.lower()]
    if missing:
        return f"{missing} not in {ending.line!r}"
    return f"left {ending.new_files}" if ending.new_files else ""


def template_project(folder: Path) -> Path:
    """A project whose inputs are all there and right, with an MLflow store, before its first stage."""
    folder.mkdir(parents=True)
    make_project_inputs(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(folder)), encoding="utf-8")
    shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
    open_store(folder)
    return folder


def copy_project(template: Path, folder: Path) -> Path:
    """A copy to spoil, whose params.yaml names its own files and not the template's."""
    shutil.copytree(template, folder)
    params = folder / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace(str(template), str(folder)), encoding="utf-8")
    return folder


def faults(cases: Iterable[BadInput], template: Path, scratch: Path) -> dict[tuple[str, str], str]:
    """What is wrong with how each case ends, by (kind, name); "" where nothing is."""
    found = {}
    for number, bad in enumerate(cases):
        folder = copy_project(template, scratch / str(number))
        found[bad.kind, bad.name] = fault(bad, folder)
        shutil.rmtree(folder, ignore_errors=True)
    return found


def tally(faults: dict[tuple[str, str], str]) -> list[str]:
    """Lines of a Markdown table: cases and those that ended well, by kind; `faults` by (kind, name)."""
    cases, well = Counter(kind for kind, _ in faults), Counter(kind for (kind, _), said in faults.items() if not said)
    rows = [f"| {kind} | {cases[kind]} | {well[kind]} |" for kind in cases]
    return ["| bad input | cases | end as they should |", "|---|---:|---:|", *rows]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "artifacts").rglob("*") if path.is_file()}
