"""States that came with sampled answers, parked until `extract` packs them: a cache and nothing else.

A row's file is the engine's own, named after the row's tokens; its record, written last, has the file's digest. What is
missing, damaged or made from something else is not there, and `extract` asks the engine for it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from specflow.files import KEPT_S, sha256_bytes, sha256_file, sha256_json, write_json, write_text
from specflow.resume import code_digest, versions

if TYPE_CHECKING:
    from specflow.paths import Paths
    from specflow.targets.model import TargetFacts


WORKSPACE = "workspace"
"""File in each folder: the workspace that filled it, the project's own or an experiment's copy."""


class ParkedStates:
    """`folder` is that of one target, engine, code, set of layers and flags; no other's states are found in it."""

    def __init__(
        self, paths: Paths, facts: TargetFacts, engine: str, layer_ids: Sequence[int], flags: Sequence[str]
    ) -> None:
        """`engine` has the version in it, `layer_ids` are those asked for, `flags` words of its command line."""
        made_by = [code_digest(paths.root, "extract"), versions(), engine, list(layer_ids), list(flags)]
        self.folder = paths.state / "parked" / sha256_json([facts.identity, *made_by])[:16]
        self._workspace = str(paths.root.resolve())
        self._shape = (len(layer_ids), facts.hidden_size)

    def put(self, tokens: Sequence[int], file: Path, next_token: int) -> None:
        """Move the engine's `file` here. `next_token` is what the engine answered after the row, greedily."""
        path, record = self._paths(tokens)
        record.unlink(missing_ok=True)
        digest = sha256_file(file)
        file.replace(path)
        write_json(record, {"sha256": digest, "next_token": next_token}, indent=None)

    def get(self, tokens: Sequence[int]) -> tuple[dict[str, Tensor], int] | None:
        """(the file's tensors, next token): hidden_states [T, L, H] and token_ids int64 [T]; None where not whole."""
        path, record = self._paths(tokens)
        try:
            about = json.loads(record.read_text(encoding="utf-8"))
            data = path.read_bytes()
            if sha256_bytes(data) != about["sha256"]:
                return None
            found, next_token = load(data), int(about["next_token"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        whole = found["hidden_states"].shape == (len(tokens), *self._shape) and found["token_ids"].tolist() == tokens
        return (found, next_token) if whole else None

    def drop(self, tokens: Sequence[int]) -> None:
        for path in reversed(self._paths(tokens)):  # the record first: a file without one is not there
            path.unlink(missing_ok=True)

    def num_bytes(self, rows: Iterable[Sequence[int]]) -> int:
        """Bytes on disk of those of `rows` that are here."""
        return sum(path.stat().st_size for path, record in map(self._paths, rows) if record.exists() and path.exists())

    def begin(self) -> None:
        """Make the folder, and delete what this workspace, or one that is gone, has parked for another target, engine
        or set of layers: nobody will ask for it.
        """
        write_text(self.folder / WORKSPACE, self._workspace)
        for other in self.folder.parent.glob("*"):
            if other != self.folder and not self._awaited(other):
                shutil.rmtree(other, ignore_errors=True)

    def _awaited(self, folder: Path) -> bool:
        """Whether an experiment that samples or extracts now may ask for what is there."""
        try:
            filled_by = (folder / WORKSPACE).read_text(encoding="utf-8")
            fresh = time.time() - folder.stat().st_mtime < KEPT_S
        except OSError:
            return False
        return filled_by != self._workspace and Path(filled_by).exists() and fresh

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, tokens: Sequence[int]) -> tuple[Path, Path]:
        name = sha256_json(list(tokens))[:32]
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
