"""What a pipeline run will do: which stages, in which order, with which resources. Knows nothing of Prefect."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.graph import StageNode
from specflow.config import load_params
from specflow.errors import UserError
from specflow.gpus.resources import stage_resources


@dataclass(frozen=True)
class Job:
    """One stage, as its task gets it; plain values, so that it can travel to another process."""

    root: str
    address: str
    slots: int
    """Slots of the limit `gpu`: GPUs of one shard times shards."""
    timeout_s: float | None
    changed: bool
    """Not as dvc.lock describes it when the run began."""
    force: bool
    pipeline_key: str
    flow_run_id: str
    gpus: int = 0
    """Devices of one shard, as declared."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    address: str
    state: Literal["ran", "restored", "cached", "failed", "skipped"]
    seconds: float = 0.0
    waited_s: float = 0.0
    """Seconds in the queue for GPU slots."""
    gpus: int = 0
    message: str = ""

    @property
    def moved(self) -> bool:
        """Whether outputs may differ from before, so that what depends on them must look again."""
        return self.state in ("ran", "restored")


def select(
    graph: Mapping[str, StageNode], families: Sequence[str] | None, stages: Sequence[str] | None
) -> dict[str, StageNode]:
    """The part of `graph` that a run works on, upstream first, edges restricted to it.

    `families` leaves out other families' stages but never those over all families; `stages` (names or addresses) means
    these and their upstream within the chosen families. None or empty is everything. Raises UserError for unknown ones.
    """
    known = sorted({node.family for node in graph.values() if node.family is not None})
    for family in families or ():
        if family not in known:
            raise UserError(f"unknown family {family!r}: {_hint(family, known)}")
    chosen = {
        address: node
        for address, node in graph.items()
        if not families or node.family is None or node.family in families
    }
    if stages:
        wanted = [node.address for name in stages for node in _named(name, graph, chosen)]
        keep: set[str] = set()
        while wanted:
            address = wanted.pop()
            if address in chosen and address not in keep:
                keep.add(address)
                wanted += chosen[address].upstream
        chosen = {address: node for address, node in chosen.items() if address in keep}
    return {
        address: StageNode(address, node.stage, node.family, tuple(up for up in node.upstream if up in chosen))
        for address, node in chosen.items()
    }


def _named(name: str, graph: Mapping[str, StageNode], chosen: Mapping[str, StageNode]) -> list[StageNode]:
    found = [node for node in chosen.values() if name in (node.stage, node.address)]
    if not found:
        if any(name in (node.stage, node.address) for node in graph.values()):
            raise UserError(f"no stage {name!r} in the chosen families: choose others, or leave families out")
        known = sorted({node.stage for node in graph.values()})
        raise UserError(f"unknown stage {name!r}: {_hint(name, known)}")
    return found


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"dvc.yaml has {', '.join(known) or 'none'}"


def make_jobs(
    root: Path, nodes: Iterable[StageNode], changed: set[str], *, force: bool, flow_run_id: str
) -> dict[str, Job]:
    """A job per stage, in order. A project without params.yaml declares its resources in dvc.yaml alone."""
    file = root / "params.yaml"
    families = load_params(file).families if file.exists() else {}
    on_cpu = not _has_gpus()
    jobs = {}
    for node in nodes:
        needs = stage_resources(root, node.stage, families.get(node.family or ""))
        # Without a GPU the CPU is the one device: it is what one slot stands for.
        slots = min(1, needs.gpus) if on_cpu else needs.gpus * needs.shards
        jobs[node.address] = Job(
            root=str(root),
            address=node.address,
            slots=slots,
            timeout_s=needs.timeout_s,
            changed=force or node.address in changed,
            force=force,
            pipeline_key=f"prefect {flow_run_id}",
            flow_run_id=flow_run_id,
            gpus=needs.gpus,
        )
    return jobs


def num_devices() -> int:
    """Devices that the limit `gpu` counts: GPUs, or 1 for the CPU of a machine without one."""
    from specflow.gpus.nvml import NoGpus, inventory

    try:
        return max(1, len(inventory()))
    except NoGpus:
        return 1


def _has_gpus() -> bool:
    from specflow.gpus.nvml import NoGpus, inventory

    try:
        return bool(inventory())
    except NoGpus:
        return False


def dvc_command(*words: str) -> list[str]:
    """DVC of this environment. Waiting for the lock matters: a stage whose commit finds it taken loses its work."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def stage_environment(pipeline_key: str) -> dict[str, str]:
    """Environment of a stage: this environment's commands first, and the MLflow parent that its run belongs to."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "SPECFLOW_PIPELINE": pipeline_key, "DVC_NO_ANALYTICS": "1"}
