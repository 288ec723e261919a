"""The stage graph and what is stale, read from DVC. The only user of DVC's Python API.

`Repo.index` and `Stage.status` are not documented API: pyproject.toml bounds DVC, and a test compares with what
`dvc dag` and `dvc status` say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.errors import UserError


@dataclass(frozen=True)
class StageNode:
    address: str
    """As DVC names it: `sample@smollm2`, `report`."""
    stage: str
    family: str | None
    """The matrix item; None for a stage over all families."""
    upstream: tuple[str, ...]
    """Addresses of the stages whose outputs this one depends on, sorted."""


def stage_graph(root: Path) -> dict[str, StageNode]:
    """Every stage of the project by address, each after its upstream. Raises UserError where DVC cannot read it."""
    import networkx as nx

    with _repo(root) as repo:
        graph = _read(root, lambda: repo.index.graph)
        # DVC's edges point from a stage to its upstream; a cycle is an error that DVC itself raises.
        ordered = nx.lexicographical_topological_sort(graph.reverse(), key=lambda stage: _address(root, stage))
        nodes = {}
        for stage in ordered:
            address = _address(root, stage)
            name, _, family = address.partition("@")
            upstream = tuple(sorted(_address(root, before) for before in graph.successors(stage)))
            nodes[address] = StageNode(address, name, family or None, upstream)
    return nodes


def changed_stages(root: Path, targets: Iterable[str] | None = None) -> set[str]:
    """Addresses among `targets` (default all) that are not as dvc.lock describes them; no command runs.

    One call hashes what changed on disk and takes 0.3 s and more, so ask for several stages at once. A stage whose
    upstream is stale counts as unchanged until that upstream has run, and `inputs`, which DVC always runs, as unchanged
    where it would write what is there.
    """
    wanted = None if targets is None else set(targets)
    if wanted == set():
        return set()
    from dvc.repo import lock_repo

    with _repo(root) as repo, lock_repo(repo):
        stages = {_address(root, stage): stage for stage in _read(root, lambda: repo.index.stages)}
        looked_at = stages if wanted is None else wanted & set(stages)
        return {address for address in looked_at if _is_changed(root, address, _read(root, stages[address].status))}


def _is_changed(root: Path, address: str, status: dict[str, list[Any]]) -> bool:
    name, _, family = address.partition("@")
    if name == "inputs" and family and status.get(address) == ["always changed"]:
        from specflow.stage import inputs_are_current

        return not inputs_are_current(family, root / "params.yaml")
    return bool(status)


def _address(root: Path, stage: Any) -> str:
    """As `stage.addressing`, but relative to the project's root instead of the current folder."""
    file = os.path.relpath(stage.dvcfile.path, root)
    name = getattr(stage, "name", None)
    return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"


def _repo(root: Path) -> Any:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        return Repo(str(root), _wait_for_lock=True)
    except NotDvcRepoError:
        raise UserError(f"{root.resolve()} is not a DVC project: run `specflow init` there first") from None


def _read(root: Path, read: Any) -> Any:
    from dvc.exceptions import DvcException

    try:
        return read()
    except DvcException as error:  # dvc.yaml that does not parse, a template key that params.yaml lacks, a cycle
        raise UserError(f"DVC cannot read {root / 'dvc.yaml'}: {' '.join(str(error).split())}") from None


def experiment_metrics(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Metrics of DVC experiments: by experiment, by path of the metrics file, what the file holds."""
    wanted = list(names)
    with _repo(root) as repo:
        shown = _read(root, lambda: repo.metrics.show(revs=wanted)) if wanted else {}
    return {
        name: {path: entry.get("data", {}) for path, entry in shown.get(name, {}).get("data", {}).items()}
        for name in wanted
    }
