"""Stage `extract`: the target's residual streams and final states of every sample row, into the hidden-state store.

What goes into which shard and batch is planned before the first forward and depends on the rows alone, so a run that
was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from specflow.errors import UserError
from specflow.files import read_jsonl, sha256_file, sha256_json, write_json
from specflow.hidden_states import (
    LAYER_ID_CONVENTION,
    Captured,
    Manifest,
    PlannedShard,
    RowInfo,
    ShardInfo,
    ShardWriter,
    bytes_per_token,
)
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import capture_hooks
from specflow.targets.model import TargetFacts, decoder_of, load_model, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specflow.config import Extract, Family, Params
    from specflow.paths import Log, Paths


logger = logging.getLogger("specflow")
SPLITS = ("train", "eval")
DISK_MARGIN = 0.95
"""Share of the free space that a store may take."""


def run(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Capture both splits and write the manifest; shards that an earlier run finished are kept."""
    facts, settings = read_facts(paths.target), family.extract
    aux_layer_ids = resolve_aux_layer_ids(facts, settings)
    files = {split: paths.samples / f"{split}.jsonl" for split in SPLITS}
    made_by = f"dvc repro sample@{name}"
    samples = {split: read_jsonl(file, what="samples", made_by=made_by) for split, file in files.items()}
    samples_digest = sha256_json({split: sha256_file(file) for split, file in files.items()})
    key = _store_key(facts, settings, aux_layer_ids, samples_digest)
    kept, counts = select_rows(samples, settings)
    if not kept:
        raise UserError(f"extract: none of {counts['rows']} sample rows has a supervised token: run `{made_by}` again")
    token_bytes = bytes_per_token(facts.hidden_size, len(aux_layer_ids), settings.dtype)
    shards = plan_shards(kept, max(settings.shard_bytes // token_bytes, 1), key)
    folder = paths.state / "hidden_states" / key
    folder.mkdir(parents=True, exist_ok=True)
    done = {s.number: info for s in shards if (info := s.finished(folder)) is not None}
    missing = [shard for shard in shards if shard.number not in done]
    num_tokens = sum(shard.num_tokens for shard in shards)
    missing_tokens = sum(shard.num_tokens for shard in missing)
    check_disk(folder, missing_tokens * token_bytes, num_tokens * token_bytes)
    started = time.perf_counter()
    if missing:
        model = load_model(facts, paths.cache, device="cuda" if torch.cuda.is_available() else "cpu")
        tokens_of = {row.info.id: row.token_ids for row in kept}
        done |= capture(model, missing, tokens_of, folder, settings, aux_layer_ids)
    elapsed_s = time.perf_counter() - started
    manifest = Manifest(
        family=name,
        target_digest=facts.digest,
        tokenizer_digest=facts.tokenizer_digest,
        template_digest=facts.template_digest,
        samples_digest=samples_digest,
        aux_layer_ids=aux_layer_ids,
        dtype=settings.dtype,
        hidden_size=facts.hidden_size,
        folder=os.path.relpath(folder, paths.manifest.parent),
        shards=[done[shard.number] for shard in shards],
        rows=[row for shard in shards for row in shard.rows],
    )
    write_json(paths.manifest, manifest.model_dump(mode="json"), indent=None)
    return {
        **counts,
        "captured_rows": len(kept),
        "captured_tokens": num_tokens,
        "shards": len(shards),
        "resumed_shards": len(shards) - len(missing),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "tok_s": missing_tokens / elapsed_s if missing else 0.0,
    }


def resolve_aux_layer_ids(facts: TargetFacts, settings: Extract) -> list[int]:
    """Ascending layer ids to capture. Raises UserError for ids given twice, out of range, or none at all."""
    given = facts.default_aux_layer_ids() if settings.aux_layer_ids is None else settings.aux_layer_ids
    ids = sorted(set(given))
    n = facts.num_hidden_layers
    if not ids or len(ids) != len(given) or ids[-1] > n:
        raise UserError(f"extract.aux_layer_ids is {given}: give distinct ids within 0..{n} ({LAYER_ID_CONVENTION})")
    return ids


def _store_key(facts: TargetFacts, settings: Extract, aux_layer_ids: list[int], samples_digest: str) -> str:
    identity = {
        "target": [facts.digest, facts.dtype],
        "tokenizer": facts.tokenizer_digest,
        "template": facts.template_digest,
        "samples": samples_digest,
        "aux_layer_ids": aux_layer_ids,
        "settings": settings.model_dump(mode="json", exclude={"aux_layer_ids"}),
    }
    return sha256_json(identity)[:16]


@dataclass(frozen=True)
class SampleRow:
    """A sample row that is to be captured; `info` has no place in a shard yet."""

    info: RowInfo
    token_ids: list[int]


def select_rows(samples: dict[str, list[Any]], settings: Extract) -> tuple[list[SampleRow], dict[str, float]]:
    """Rows to capture, by policy for long ones, and counts of what was cut, dropped or had nothing supervised."""
    limit = settings.max_length_tokens
    counts: dict[str, float] = {"rows": 0, "cut_rows": 0, "dropped_rows": 0, "unsupervised_rows": 0}
    kept = []
    for split, rows in samples.items():
        for row in rows:
            counts["rows"] += 1
            token_ids = row["token_ids"]
            if len(token_ids) > limit:
                counts["cut_rows" if settings.on_too_long == "cut" else "dropped_rows"] += 1
                if settings.on_too_long == "drop":
                    continue
            spans = [(start, min(end, limit)) for start, end in row["spans"] if start < min(end, limit)]
            if not spans:
                counts["unsupervised_rows"] += 1
                continue
            token_ids = token_ids[:limit]
            info = RowInfo(
                id=row["id"],
                split=split,
                category=row["category"],
                shard=0,
                offset=0,
                length=len(token_ids),
                spans=spans,
            )
            kept.append(SampleRow(info, token_ids))
    return kept, counts


def plan_shards(rows: Sequence[SampleRow], shard_tokens: int, key: str) -> list[PlannedShard]:
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
    return [PlannedShard(number, tuple(infos), key) for number, infos in enumerate(shards)]


def check_disk(folder: Path, missing_bytes: int, total_bytes: int) -> None:
    """Report what the store will take; raise UserError where the disk cannot hold what is still missing."""
    free = shutil.disk_usage(folder).free
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


def plan_batches(rows: Sequence[RowInfo], batch_tokens: int) -> Iterator[Sequence[RowInfo]]:
    """Consecutive rows, longest first, whose right-padded batch has at most `batch_tokens` tokens (or a single row)."""
    start = 0
    while start < len(rows):
        size = max(batch_tokens // rows[start].length, 1)
        yield rows[start : start + size]
        start += size


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


class StateCapture:
    """Runs the target's decoder, without its head, and keeps the residual streams and the post-norm last state."""

    def __init__(self, model: PreTrainedModel, aux_layer_ids: Sequence[int], dtype: torch.dtype) -> None:
        """`dtype` is that of the states given back. The model is optimised for inference in place."""
        self._decoder = decoder_of(optimise_for_inference(model))
        self._aux: dict[int, Tensor] = {}
        self._aux_layer_ids, self._dtype = list(aux_layer_ids), dtype
        self._hooks = capture_hooks(self._decoder, aux_layer_ids, self._aux)

    def __enter__(self) -> StateCapture:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.inference_mode()
    def __call__(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of token lists, end to end without padding: ids int32 [N], aux [N, A * H], final [N, H], finite
        bool [N].

        One right-padded forward, so rows of similar length cost least; causal attention keeps the padding from the
        tokens before it.
        """
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        padded = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
        real = (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]
        device = next(self._decoder.parameters()).device
        final = self._decoder(input_ids=padded.to(device), use_cache=False).last_hidden_state
        index = real.to(device)

        def packed(states: Tensor) -> Tensor:
            states = states.flatten(0, 1)
            return (states if len(real) == len(states) else states[index]).to(self._dtype)

        features = torch.cat([packed(self._aux[layer]) for layer in self._aux_layer_ids], dim=-1)
        last = packed(final)
        finite = torch.isfinite(features).all(-1) & torch.isfinite(last).all(-1)
        return padded.flatten()[real].int(), features, last, finite
