"""One checkpoint file per run: everything an interrupted run needs to go on bitwise as if it had not stopped.

Lives in the run's resume state (`resume.py`), outside DVC's outputs, which DVC deletes before a stage runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specflow.files import atomic_path


@dataclass
class Progress:
    """Where a run stands. `step` counts finished optimizer steps."""

    step: int = 0
    best_step: int = -1
    best_acceptance_length: float = 0.0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {"training": [], "eval": []})
    fit_r2: float = 0.0
    """R^2 of the closed-form start, 0 without one."""
    seconds: float = 0.0
    """Training time over all sessions of the run, without evaluation."""


class Checkpoints:
    def __init__(self, folder: Path) -> None:
        """`folder` is the run's own."""
        self.path = folder / "last.pt"

    def save(self, progress: Progress, draft: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write weights, optimizer, RNG and progress under the same name by rename."""
        with atomic_path(self.path) as temporary:
            torch.save(
                {
                    "progress": vars(progress),
                    "draft": draft.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                },
                temporary,
            )

    def load(self, draft: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore the last checkpoint of the run into its arguments, or return a fresh Progress."""
        if not self.path.exists():
            return Progress()
        state: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
        draft.load_state_dict(state["draft"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return Progress(**state["progress"])
