"""The pipeline on a schedule, for families whose data or target reference moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Failed

from flows.pipeline import pipeline
from specflow.config import load_params
from specflow.errors import UserError


@flow(name="nightly", flow_run_name="nightly")
def nightly(families: list[str] | None = None, promote: bool = False) -> Any:
    """Run the pipeline, and on request let the better draft of each family become its champion.

    Args:
        families: Families to work on; none: all that params.yaml lists.
        promote: Move the alias `champion` of a family to its new draft where that is better by its paired interval.
    """
    state = pipeline(families=families, return_state=True)
    if promote and state.is_completed():
        try:
            _promote(families)
        except UserError as error:
            return Failed(message=str(error))
    return state


def _promote(families: list[str] | None) -> None:
    from specflow.compare.promote import promote
    from specflow.stage import family_paths, listed_families

    params = load_params(Path("params.yaml"))
    for name in families or listed_families(params):
        for sentence in promote(name, params, family_paths(name, params)).sentences:
            get_run_logger().info("%s: %s", name, sentence)
