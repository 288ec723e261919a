"""What a pipeline run shows in the Prefect UI: stages, benchmark tables, links to runs and report, progress."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.graph import StageNode
from flows.plan import Outcome
from specflow.paths import Paths
from specflow.tracking.store import where_to_look

STATES = ("ran", "restored", "cached", "failed", "skipped")
PROGRESS_AFTER_S = 20.0
"""A stage that is done sooner needs none."""
PROGRESS_EVERY_S = 5.0


class Progress:
    """A progress artifact of one stage. It appears once the stage has shown a bar for a while, and follows it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._artifact: UUID | None = None
        self._next = time.monotonic() + PROGRESS_AFTER_S

    def update(self, percent: float, text: str) -> None:
        """Show the bar's percentage and text, at most every PROGRESS_EVERY_S seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_EVERY_S
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, key=key("progress", self._address), description=text)
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except httpx.HTTPError:  # a server that is away for a moment does not stop the stage
            self._next += 60.0


def publish(root: Path, nodes: Iterable[StageNode], outcomes: Sequence[Outcome], runs: dict[str, str]) -> None:
    """Write the artifacts of a finished run. `runs` is the MLflow parent run id by family."""
    create_table_artifact([_row(outcome) for outcome in outcomes], key="stages", description=_legend(outcomes))
    families = sorted({node.family for node in nodes if node.family is not None})
    for family in families:
        paths = Paths(root=root, family=family, cache=root)
        if (paths.bench / "summary.json").exists():
            from specflow.project import family_table
            from specflow.results.schema import family_summary

            table = family_table(family, family_summary(paths))
            create_markdown_artifact(
                f"```\n{table}\n```", key=key("benchmark", family), description=f"{family}: benchmark"
            )
    lines = [f"- MLflow run of {family}: `{run_id}` (`{where_to_look(root)}`)" for family, run_id in runs.items()]
    if (report := root / "report" / "report.html").exists():
        lines.append(f"- Report: [{report}]({report.resolve().as_uri()})")
    if lines:
        create_markdown_artifact("\n".join(lines), key="links", description="Where the results are")


def _row(outcome: Outcome) -> dict[str, str]:
    ran = outcome.state in ("ran", "restored")
    return {
        "stage": outcome.address,
        "state": outcome.state,
        "seconds": f"{outcome.seconds:.1f}" if ran else "",
        "waited for GPU (s)": f"{outcome.waited_s:.1f}" if ran and outcome.gpus else "",
        "GPUs": str(outcome.gpus) if ran else "",
        "message": outcome.message,
    }


def _legend(outcomes: Sequence[Outcome]) -> str:
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def key(*parts: str) -> str:
    """An artifact key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
