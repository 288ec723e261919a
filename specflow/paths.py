"""Where things live, relative to the project folder: the names that dvc.yaml, the stages and the docs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specflow.errors import UserError

Log = Callable[[dict[str, float], int], None]
"""How a stage reports points of a curve: (values, step)."""


@dataclass(frozen=True)
class Paths:
    """Files of one family. `artifacts/` holds what DVC tracks; `state` what survives a kill and is never an output."""

    root: Path
    family: str
    cache: Path
    """Downloads and dequantised targets, shared between projects; content-keyed."""

    @property
    def base(self) -> Path:
        return self.root / "artifacts" / self.family

    @property
    def target(self) -> Path:
        return self.base / "target.json"

    def inputs(self, stage: str) -> Path:
        """Digests of what `stage` reads from outside the project."""
        return self.base / "inputs" / f"{stage}.json"

    @property
    def prompts(self) -> Path:
        """Folder: train.jsonl, eval.jsonl, data_report.json."""
        return self.base / "prompts"

    @property
    def samples(self) -> Path:
        """Folder: train.jsonl, eval.jsonl."""
        return self.base / "samples"

    @property
    def vocab(self) -> Path:
        """Folder: vocab.safetensors (d2t, t2d), coverage.json."""
        return self.base / "vocab"

    @property
    def manifest(self) -> Path:
        return self.base / "hidden_states.json"

    @property
    def draft(self) -> Path:
        """Folder: config.json, model.safetensors of the trained draft, specflow's own form."""
        return self.base / "draft"

    @property
    def export(self) -> Path:
        """Folder: eagle3/ (plain HF form for vLLM and SGLang), contract.json."""
        return self.base / "export"

    @property
    def bench(self) -> Path:
        """Folder: records.jsonl, summary.json."""
        return self.base / "bench"

    def metrics(self, stage: str) -> Path:
        return self.base / "metrics" / f"{stage}.json"

    def plot(self, name: str) -> Path:
        """A DVC plot file (.json, list of points)."""
        return self.base / "plots" / name

    @property
    def report(self) -> Path:
        """Folder over all families: report.{html,md} and <family>.{html,md}. Not in `artifacts`: its stage depends on
        all of that.
        """
        return self.root / "report"

    @property
    def state(self) -> Path:
        """Resume logs, checkpoints and the hidden-state store: kept outside DVC outs, which DVC deletes first.

        An experiment's copy shares it with the project, so what is written there has a folder by its key (`resume.py`).
        """
        return project_home(self.root) / ".specflow" / self.family

    @property
    def servers(self) -> Path:
        """Folder of the output of servers that a stage starts; an experiment's copy has its own."""
        copy = self.root.resolve()
        return self.state / "servers" / ("" if copy == project_home(copy) else copy.name)


def project_home(root: Path) -> Path:
    """The project `root` belongs to: itself, or for DVC's copy of a queued experiment the folder copied from.

    What must outlive such a copy (resume state, hidden-state shards, the MLflow store) lives at the home.
    """
    parts = root.resolve().parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return root


def outside(reference: str) -> Path:
    """A path that params.yaml names: `~` expanded, a relative one below the project's home.

    A queued experiment runs in a copy of the project that lacks what git ignores; its inputs are those of the home.
    Raises UserError where `~user` is nobody.
    """
    try:
        path = Path(reference).expanduser()
    except RuntimeError:
        raise UserError(f"{reference}: this machine has no home folder of that name, write the path out") from None
    return path if path.is_absolute() else project_home(Path()) / path
