"""`sample.keep_states`: the servers that answer also hand out the states that they computed on the way.

Such a server keeps the states of every token in its prefix cache, of decoded ones too. A finished row is asked for as
`extract` would ask, as a prompt that wants one token more; what is left to compute is its end, less than a cache block.
(vLLM's `include_output_tokens` saves that as well, but has no state of a row's last token, which never was an input.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError
from specflow.extract.engine_files import scratch_folder, wait_until_written
from specflow.extract.parked import ParkedStates
from specflow.extract.stage import DISK_MARGIN
from specflow.extract.vllm import parked_states
from specflow.extract.vllm_flags import Layers, check_settings, file_of, with_capture
from specflow.hidden_states import bytes_per_token
from specflow.serving.client import Client, Completion, Request
from specflow.serving.engines import Install, Launch, find_install
from specflow.targets.model import resolve_aux_layer_ids

if TYPE_CHECKING:
    from specflow.config import Family, Serve
    from specflow.paths import Paths
    from specflow.targets.model import TargetFacts

logger = logging.getLogger("specflow")


@contextlib.contextmanager
def keeping(
    family: Family, facts: TargetFacts, paths: Paths, longest: int, lengths: Sequence[int]
) -> Iterator[AnswerStates]:
    """Keeps the states of rows of at most `longest` tokens; `lengths` are those expected at most.

    Raises UserError for server settings that a capture does not take, and where the disk is too small.
    """
    if family.serve.dtype not in (None, facts.dtype):
        raise UserError(
            f"serve.dtype is {family.serve.dtype}, but sample.keep_states keeps states in target.dtype, {facts.dtype}: "
            "take serve.dtype out, or set keep_states to false"
        )
    serve = check_settings(family.serve, facts, longest)
    aux_layer_ids = resolve_aux_layer_ids(facts, family.extract)
    parked = parked_states(family, facts, paths, aux_layer_ids)
    parked.begin()
    check_disk(parked.folder, sum(lengths) * bytes_per_token(facts.hidden_size, len(aux_layer_ids), facts.dtype))
    concurrency = family.sample.concurrency
    with scratch_folder(parked.folder, parked.folder) as scratch:
        yield AnswerStates(
            serve,
            find_install("vllm", serve, paths.cache),
            Layers(tuple(aux_layer_ids), facts.num_hidden_layers),
            parked,
            scratch,
            # two tokens of a row at a time: the method drafts the sampled token once more
            budget_tokens=max(family.extract.batch_tokens, serve.max_model_len or 0, 2 * concurrency),
            max_requests=concurrency,
        )


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise UserError where the disk cannot hold the states of all answers until `extract` packs them."""
    free = shutil.disk_usage(folder).free
    logger.info(
        "sample: at most %.2f GB of states to keep for extract, which deletes them as it packs them, %.1f GB free",
        needed_bytes / 1e9,
        free / 1e9,
    )
    if needed_bytes > free * DISK_MARGIN:
        raise UserError(
            f"sample.keep_states: up to {needed_bytes / 1e9:.2f} GB of states to keep, but the disk of {folder.parent} "
            f"has {free / 1e9:.2f} GB free (5 % kept): free some, lower data.train_conversations or "
            "sample.max_new_tokens, or set keep_states to false"
        )


@dataclass
class AnswerStates:
    """What `served.States` says."""

    serve: Serve
    install: Install
    layers: Layers
    parked: ParkedStates
    scratch: Path
    budget_tokens: int
    max_requests: int

    def edit(self, command: Launch) -> Launch:
        return with_capture(
            command,
            self.install,
            self.layers,
            self.scratch,
            self.budget_tokens,
            max_requests=self.max_requests,
            answers=True,
        )

    async def discard(self, completion: Completion) -> None:
        if (file := await self._written(completion)) is not None:
            file.unlink()

    async def keep(self, rows: list[dict[str, Any]], client: Client) -> dict[str, int]:
        """Counts of rows kept and of their tokens that had to be computed once more."""
        kept = recomputed = 0
        for row in rows:
            tokens = row["token_ids"]
            completion = await client.complete(Request(tokens, 1, 0.0, 0, []))
            recomputed += len(tokens) - completion.cached_tokens
            if (file := await self._written(completion)) is None:
                logger.warning("sample: vLLM wrote no states of row %s: extract will ask for them", row["id"])
            else:
                assert completion.token_ids is not None, "asked for with return_token_ids"
                await asyncio.to_thread(self.parked.put, tokens, file, completion.token_ids[0])
                kept += 1
        return {"rows_with_states": kept, "recomputed_tokens": recomputed}

    async def _written(self, completion: Completion) -> Path | None:
        """The file of states once it is whole, None where the engine failed to write it."""
        file = file_of(completion.states_file, self.scratch)
        try:
            await asyncio.to_thread(wait_until_written, file, self.serve.request_timeout_s)
        except OSError:
            return None
        return file if file.exists() else None
