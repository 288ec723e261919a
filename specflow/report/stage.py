"""Stage `report`: a self-contained page per family, one across families first, and Markdown for pull requests.

Reads files only and computes nothing that a stage did not measure, so every number can be traced to a raw file. What a
benchmark did not measure is left out of its page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specflow.config import Params
from specflow.errors import UserError
from specflow.files import atomic_path
from specflow.pages.page import environment
from specflow.paths import Paths
from specflow.report import figures
from specflow.report.content import FamilyPage, read_family

OVERVIEW = "report"
"""Name of the page across families, which no family may have."""


def run_report(params: Params, all_paths: dict[str, Paths]) -> None:
    """Write the report folder. Raises UserError naming the family whose benchmark is missing."""
    if clash := [name for name in all_paths if name.lower() == OVERVIEW]:
        raise UserError(f"a family cannot be called {clash[0]!r}, which is the page across families: rename it")
    families = [read_family(name, paths) for name, paths in all_paths.items()]
    overview = {"families": families, "differences": _differences(families), "figures": figures.overview(families)}
    pages: dict[str, dict[str, Any]] = {OVERVIEW: overview}
    pages |= {family.name: {"family": family, "figures": figures.family(family)} for family in families}
    folder = next(iter(all_paths.values())).report
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, context in pages.items():
            template = "overview" if name == OVERVIEW else "family"
            for kind in ("html", "md"):
                text = environment().get_template(f"report/templates/{template}.{kind}.j2").render(context)
                (temporary / f"{name}.{kind}").write_text(text.rstrip() + "\n", encoding="utf-8")


def _differences(families: Sequence[FamilyPage]) -> list[str]:
    """One sentence for each condition that the benchmarks do not share: their speeds do not compare across it."""
    conditions: dict[str, Callable[[FamilyPage], str]] = {
        "target": lambda family: family.source,
        "machine": lambda family: family.machine,
        "token limit": lambda family: str(family.summary.settings.max_new_tokens),
        "sampling": lambda family: f"temperature {family.summary.settings.temperature:g}",
        "prompt sets": lambda family: ", ".join(family.summary.sets),
    }
    sentences = []
    for what, told in conditions.items():
        groups: dict[str, list[str]] = {}
        for family in families:
            groups.setdefault(told(family), []).append(family.name)
        if len(groups) > 1:
            parts = "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items())
            sentences.append(f"Not the same {what} ({parts}).")
    return sentences
