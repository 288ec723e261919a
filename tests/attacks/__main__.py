"""Every bad input as a user meets it, by the command that reads it first: `python -m tests.attacks [KIND]...`.

Prints each ending that is not right, and the table of docs/reliability.md. Exit code 1 where one is not right.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from specflow.errors import UserError
from specflow.export.imports import read_draft
from specflow.stage import quieten_transformers
from tests.attacks import data, drafts, places, settings, targets
from tests.attacks.bad_input import faults, tally, template_project
from tests.attacks.drafts import BadDraft
from tests.captures import TinyProject

INPUTS = [*settings.CASES, *places.CASES, *targets.CASES, *data.CASES]
KINDS = [*dict.fromkeys(bad.kind for bad in INPUTS), "draft"]


def draft_fault(bad: BadDraft, project: TinyProject, folder: Path) -> str:
    """What is wrong with how reading a damaged draft ends, or ""; `train.init_from` reads it so."""
    bad.damage(folder)
    try:
        read_draft(folder, project.facts, project.paths.cache)
    except UserError as error:
        missing = [word for word in bad.words if word.lower() not in str(error).lower()]
        return f"{missing} not in {str(error)!r}" if missing or "\n" in str(error) else ""
    except Exception as error:  # what would be a traceback
        return f"{type(error).__name__}: {error}"
    return "accepted"


def main(kinds: list[str]) -> int:
    quieten_transformers()
    found: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        template = template_project(scratch / "template")
        found |= faults((bad for bad in INPUTS if bad.kind in kinds), template, scratch / "inputs")
        if "draft" in kinds:
            project, exported = drafts.project_with_draft(scratch)
            for number, bad in enumerate(drafts.CASES):
                copy = drafts.copy_draft(exported, scratch / f"draft-{number}")
                found["draft", bad.name] = draft_fault(bad, project, copy)
    for (kind, case), said in found.items():
        if said:
            sys.stdout.write(f"{kind}, {case}: {said}\n")
    sys.stdout.write("\n".join(tally(found)) + "\n")
    return int(any(found.values()))


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(KINDS):
        sys.exit(f"no kind {sorted(unknown)}: there are {KINDS}")
    sys.exit(main(sys.argv[1:] or KINDS))
