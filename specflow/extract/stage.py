"""Stage `extract`: the target's residual streams and final states of every sample row, into the hidden-state store.

What goes into which shard and batch is planned before the first forward and depends on the rows alone, so a run that
was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from specflow.device import default_device
from specflow.errors import UserError
from specflow.extract import vllm
from specflow.extract.capture import SampleRow, StateCapture, plan_batches, select_rows
from specflow.extract.parked import ParkedStates
from specflow.files import read_jsonl, sha256_file, sha256_json, write_json
from specflow.hidden_states import (
    Captured,
    Manifest,
    PlannedShard,
    RowInfo,
    ShardInfo,
    ShardWriter,
    bytes_per_token,
)
from specflow.resume import State, code_digest, versions
from specflow.sharding.shares import WHOLE, Share, open_state
from specflow.targets.model import TargetFacts, load_model, read_facts, resolve_aux_layer_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specflow.config import Extract, Family, Params
    from specflow.paths import Log, Paths


logger = logging.getLogger("specflow")
SPLITS = ("train", "eval")
DISK_MARGIN = 0.95
"""Share of the free space that a store may take."""


def run(name: str, family: Family, params: Params, paths: Paths, log: Log, share: Share = WHOLE) -> dict[str, float]:
    """Capture both splits and write the manifest; shards that an earlier run or shares finished are kept."""
    with ExitStack() as stack:
        work = _Work.open(stack, name, family, paths, params.store, share)
        done = work.finished(share)
        missing = [shard for shard in work.shards if shard.number not in done]
        share.check_nothing_left("extract", sum(len(shard.rows) for shard in missing))
        captured, measured = work.capture(missing)
        done |= captured
        manifest = work.manifest(done)
        write_json(paths.manifest, manifest.model_dump(mode="json"), indent=None)
        if work.parked is not None:
            work.parked.clear()  # of rows that are not in the store
        work.state.finish(keep=True)
    return {
        **work.counts,
        "captured_rows": len(work.kept),
        "captured_tokens": sum(shard.num_tokens for shard in work.shards),
        "shards": len(work.shards),
        "resumed_shards": len(work.shards) - len(missing),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        **measured,
    }


def run_share(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """Capture the shard files of one share into the store; returns what it measured.

    A file is the unit because no batch crosses one: what is computed side by side, and with it every rounding, is the
    same in however many processes.
    """
    with ExitStack() as stack:
        work = _Work.open(stack, name, family, paths, params.store, share)
        done = work.finished(share)
        own = [shard for shard in work.shards if share.owns(shard.number)]
        return work.capture([shard for shard in own if shard.number not in done])[1]


@dataclass
class _Work:
    """Inputs of the stage and the plan of its store."""

    name: str
    family: Family
    facts: TargetFacts
    engine: str
    """Name and version of what runs the target."""
    settings: Extract
    paths: Paths
    samples_digest: str
    aux_layer_ids: list[int]
    kept: list[SampleRow]
    counts: dict[str, float]
    shards: list[PlannedShard]
    state: State
    """Its folder is the store."""
    parked: ParkedStates | None
    """What may have come with the answers (vllm)."""

    @classmethod
    def open(cls, stack: ExitStack, name: str, family: Family, paths: Paths, store: str | None, share: Share) -> _Work:
        """`stack` holds the store."""
        facts, settings = read_facts(paths.target), family.extract
        aux_layer_ids = resolve_aux_layer_ids(facts, settings)
        files = {split: paths.samples / f"{split}.jsonl" for split in SPLITS}
        made_by = f"dvc repro sample@{name}"
        samples = {split: read_jsonl(file, what="samples", made_by=made_by) for split, file in files.items()}
        samples_digest = sha256_json({split: sha256_file(file) for split, file in files.items()})
        engine = engine_name(family, paths)
        kept, counts = select_rows(samples, settings)
        if not kept:
            raise UserError(
                f"extract: none of {counts['rows']} sample rows has a supervised token: run `{made_by}` again"
            )
        token_bytes = bytes_per_token(facts.hidden_size, len(aux_layer_ids), settings.dtype)
        parts = _key(facts, engine, family, paths.root, aux_layer_ids, samples_digest)
        state = stack.enter_context(open_state(paths.state / "hidden_states", f"extract@{name}", parts, share))
        url = None if store is None else f"{store.rstrip('/')}/{name}/{state.key}"
        shards = plan_shards(kept, max(settings.shard_bytes // token_bytes, 1), state.key, url)
        parked = None
        if settings.engine == "vllm":
            parked = vllm.parked_states(family, facts, paths, aux_layer_ids)
        return cls(
            name,
            family,
            facts,
            engine,
            settings,
            paths,
            samples_digest,
            aux_layer_ids,
            kept,
            counts,
            shards,
            state,
            parked,
        )

    @property
    def folder(self) -> Path:
        return self.state.folder

    def manifest(self, done: dict[int, ShardInfo]) -> Manifest:
        """Of the whole store, once every shard is among `done`."""
        return Manifest(
            family=self.name,
            target_digest=self.facts.digest,
            tokenizer_digest=self.facts.tokenizer_digest,
            template_digest=self.facts.template_digest,
            samples_digest=self.samples_digest,
            engine=self.engine,
            aux_layer_ids=self.aux_layer_ids,
            dtype=self.settings.dtype,
            hidden_size=self.facts.hidden_size,
            folder=os.path.relpath(self.folder, self.paths.manifest.parent),
            store=self.shards[0].store,
            shards=[done[shard.number] for shard in self.shards],
            rows=[row for shard in self.shards for row in shard.rows],
        )

    def finished(self, share: Share) -> dict[int, ShardInfo]:
        """Shards that are there, by number. Digests are checked by the process that would have to make them anew."""
        found = {s.number: s.finished(self.folder, verify=share.owns(s.number)) for s in self.shards}
        done = {number: info for number, info in found.items() if info is not None}
        total = sum(shard.num_tokens for shard in self.shards)
        left = total - sum(info.tokens for info in done.values())
        token_bytes = bytes_per_token(self.facts.hidden_size, len(self.aux_layer_ids), self.settings.dtype)
        if (store := self.shards[0].store) is None:
            freed = 0 if self.parked is None else self.parked.num_bytes(row.token_ids for row in self.kept)
            check_disk(self.folder, left * token_bytes, total * token_bytes, freed)
        else:
            logger.info(
                "extract: %.2f GB in %s, %.2f GB missing", total * token_bytes / 1e9, store, left * token_bytes / 1e9
            )
        return done

    def capture(self, missing: Sequence[PlannedShard]) -> tuple[dict[int, ShardInfo], dict[str, float]]:
        """Write `missing` shards; returns them by number, and their metrics: tokens per second (0 where nothing was
        missing) and, with vllm, how many rows had come with their answers.
        """
        started, from_sampling = time.perf_counter(), 0
        done: dict[int, ShardInfo] = {}
        tokens_of = {row.info.id: row.token_ids for row in self.kept}
        if missing and self.parked is not None:
            done, from_sampling = vllm.capture(
                self.name,
                self.family,
                self.facts,
                self.paths,
                missing,
                tokens_of,
                self.folder,
                self.aux_layer_ids,
                self.parked,
            )
        elif missing:
            model = load_model(self.facts, self.paths.cache, device=str(default_device()))
            done = capture(model, missing, tokens_of, self.folder, self.settings, self.aux_layer_ids)
        tok_s = sum(shard.num_tokens for shard in missing) / (time.perf_counter() - started)
        return done, {"tok_s": tok_s} | ({} if self.parked is None else {"rows_from_sampling": from_sampling})


def engine_name(family: Family, paths: Paths) -> str:
    """What runs the target, with its version. Raises UserError where it is not installed."""
    if family.extract.engine == "vllm":
        return vllm.engine_name(family.serve, paths.cache)
    return f"transformers {transformers.__version__}"


def _key(
    facts: TargetFacts, engine: str, family: Family, root: Path, aux_layer_ids: list[int], samples_digest: str
) -> dict[str, Any]:
    """What the shards depend on."""
    settings = family.extract
    return {
        "code": code_digest(root, "extract"),
        "versions": versions() | {"engine": engine},
        "target": facts.identity,
        "inputs": samples_digest,
        "settings": {
            **settings.model_dump(mode="json", exclude={"aux_layer_ids"}),
            "aux_layer_ids": aux_layer_ids,
            "flags": family.serve.extra_args if settings.engine == "vllm" else [],  # may change what is computed
        },
    }


def plan_shards(rows: Sequence[SampleRow], shard_tokens: int, key: str, store: str | None = None) -> list[PlannedShard]:
    """Give each row its place: sorted by length so that batches need little padding, shards of at most `shard_tokens`.

    A row longer than that has a shard of its own.
    """
    shards: list[list[RowInfo]] = []
    offset = 0
    for row in sorted(rows, key=lambda row: (-row.info.length, row.info.split, row.info.id)):
        if not shards or offset + row.info.length > shard_tokens:
            shards.append([])
            offset = 0
        shards[-1].append(row.info.model_copy(update={"shard": len(shards) - 1, "offset": offset}))
        offset += row.info.length
    return [PlannedShard(number, tuple(infos), key, store) for number, infos in enumerate(shards)]


def check_disk(folder: Path, missing_bytes: int, total_bytes: int, freed_bytes: int = 0) -> None:
    """Report what the store will take; raise UserError where the disk cannot hold what is still missing.

    `freed_bytes` lie there parked and go as the store grows.
    """
    free = shutil.disk_usage(folder).free + freed_bytes
    logger.info(
        "extract: the store takes %.2f GB, %.2f GB to write, %.1f GB free",
        total_bytes / 1e9,
        missing_bytes / 1e9,
        free / 1e9,
    )
    if missing_bytes > free * DISK_MARGIN:
        raise UserError(
            f"extract: {missing_bytes / 1e9:.2f} GB to write, but the disk of {folder.parent} has {free / 1e9:.2f} GB "
            "free (5 % kept): free some, delete old stores there, or lower data.train_conversations or "
            "extract.max_length_tokens"
        )


def capture(
    model: PreTrainedModel,
    shards: Sequence[PlannedShard],
    tokens_of: dict[str, list[int]],
    folder: Path,
    settings: Extract,
    aux_layer_ids: Sequence[int],
) -> dict[int, ShardInfo]:
    """Write `shards` into `folder`; return them by number. The model is optimised for inference in place."""
    total = sum(shard.num_tokens for shard in shards)
    with (
        StateCapture(model, aux_layer_ids, getattr(torch, settings.dtype)) as states_of,
        ShardWriter(folder, settings.dtype) as writer,
        tqdm(total=total, desc="extract", unit="token", unit_scale=True) as progress,
    ):
        for shard in shards:
            for rows in plan_batches(shard.rows, settings.batch_tokens):
                writer.put(Captured(shard, rows, *states_of([tokens_of[row.id] for row in rows])))
                progress.update(sum(row.length for row in rows))
    return writer.done
