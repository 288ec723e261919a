"""What a stage needs to run: `meta` of dvc.yaml, overlaid by `families.F.resources` of params.yaml.

Neither is a parameter of DVC: another number of GPUs makes no result stale.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError

if TYPE_CHECKING:
    from specflow.config import Family


@dataclass(frozen=True)
class Resources:
    """What one run of a stage takes, every field decided."""

    gpus: int = 0
    gpu_memory_gb: float | None = None
    """Free memory that each device must have, in units of 1e9 bytes; None: the device must be unused."""
    timeout_s: float | None = None
    """Seconds after which the flow's runner stops the stage; the stage itself does not look at it."""
    shards: int = 1
    declared: bool = False
    """Whether dvc.yaml or params.yaml says how many GPUs the stage takes. Nothing is leased or hidden otherwise."""


def stage_resources(root: Path, stage: str, family: Family | None) -> Resources:
    """Resources of `stage` in the project at `root`; without dvc.yaml, or without the stage in it, nothing is declared.

    Raises UserError for a dvc.yaml that cannot be read and for values that make no sense.
    """
    said = _from_dvc(root / "dvc.yaml", stage)
    if family is not None and stage in family.resources:
        said |= family.resources[stage].model_dump(exclude_none=True)
    return Resources(**said, declared="gpus" in said)


def _from_dvc(path: Path, stage: str) -> dict[str, Any]:
    import yaml
    from pydantic import ValidationError

    from specflow import config

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    stages = (raw or {}).get("stages") or {}
    meta = (stages.get(stage) or {}).get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"{path}: stages.{stage}.meta is {meta!r}: expected keys such as gpus and timeout_s")
    known = list(config.Resources.model_fields)
    for key in meta:  # meta is free for other tools' keys too, so only a near miss is a mistake
        if key not in known and (close := difflib.get_close_matches(str(key), known, n=1)):
            raise UserError(f"{path}: unknown key stages.{stage}.meta.{key}: did you mean {close[0]!r}?")
    try:
        ours = config.Resources.model_validate({key: value for key, value in meta.items() if key in known})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path}: stages.{stage}.meta.{first['loc'][0]}"
        raise UserError(
            f"{where}: {first['msg']}, got {first['input']!r}; what differs by family goes to families.F.resources"
        ) from None
    return ours.model_dump(exclude_none=True)
