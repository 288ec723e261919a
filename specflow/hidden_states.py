"""The hidden-state store: packed safetensors shards outside DVC, and the manifest that DVC tracks.

A shard holds rows back to back, without padding: `token_ids` int32 [N], `aux` [N, A * H] in ascending layer order and
`final` [N, H], the post-norm last state. Owns the files and their checks; what is captured is `extract/stage.py`'s.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specflow import remote_store
from specflow.errors import UserError
from specflow.files import atomic_path, read_json, sha256_file, sha256_json, write_json

LAYER_ID_CONVENTION = "residual after k layers, 0 = embeddings"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowInfo(_Record):
    """Where a captured row lies: tokens `offset` .. `offset + length` of shard number `shard`."""

    id: str
    split: str
    category: str
    shard: int
    offset: int
    length: int
    spans: list[tuple[int, int]]
    """Half-open ranges of supervised tokens."""


class ShardInfo(_Record):
    file: str
    sha256: str
    rows: int
    tokens: int
    bytes: int


class Manifest(_Record):
    """What a store holds and what it was made from; equal inputs give an equal file, byte for byte."""

    family: str
    target_digest: str
    tokenizer_digest: str
    template_digest: str
    samples_digest: str
    engine: str = "transformers"
    """What ran the target, with its version."""
    aux_layer_ids: list[int]
    layer_id_convention: str = LAYER_ID_CONVENTION
    dtype: str
    hidden_size: int
    folder: str
    """Folder of the shards, relative to the manifest's own."""
    store: str | None = None
    """URL of the folder that has the shards; `folder` is then a cache of them."""
    shards: list[ShardInfo]
    rows: list[RowInfo]


def bytes_per_token(hidden_size: int, num_aux: int, dtype: str) -> int:
    """Bytes that one captured token takes on disk: its states and its int32 id."""
    return (num_aux + 1) * hidden_size * getattr(torch, dtype).itemsize + 4


@dataclass(frozen=True)
class Expected:
    """What a reader needs the store to be made from; a manifest of anything else is refused."""

    target_digest: str
    template_digest: str
    dtype: str
    aux_layer_ids: list[int]


class HiddenStateStore:
    """Reads rows of a store through memory-mapped shards."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self._handles: dict[int, Any] = {}
        self._dtype = getattr(torch, manifest.dtype)

    @classmethod
    def open(cls, manifest_path: Path, expect: Expected | None = None) -> HiddenStateStore:
        """Open the store of a manifest, after checking what it was made from and that its shards are all there.

        Raises UserError for what does not fit; `verify` looks further than the shards' sizes.
        """
        raw = read_json(manifest_path, what="hidden-state manifest", made_by="dvc repro extract@<family>")
        manifest = Manifest.model_validate(raw)
        store = cls(manifest, manifest_path.parent / manifest.folder)
        if expect is not None:
            _check_expected(manifest_path, manifest, expect)
        for shard in manifest.shards:
            store._check_shard(shard, verify=False)
        return store

    def verify(self) -> None:
        """Raise UserError where a shard's digest is not the manifest's; fetches what a shared store has."""
        for shard in self.manifest.shards:
            self._check_shard(shard, verify=True)

    @property
    def _fix(self) -> str:
        return f"run `dvc repro -f extract@{self.manifest.family}`"

    def _check_shard(self, shard: ShardInfo, *, verify: bool) -> None:
        path = self.folder / shard.file
        if not path.exists() and self.manifest.store is not None:
            if verify:
                self._fetch(shard)
            elif remote_store.size(self.manifest.store, shard.file) != shard.bytes:
                raise UserError(f"{self.manifest.store}/{shard.file} is missing or cut off: {self._fix}")
            return
        if not path.exists():
            raise UserError(f"hidden-state shard {path} is missing: {self._fix}")
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(f"hidden-state shard {path} has {size} bytes, the manifest says {shard.bytes}: {self._fix}")
        if verify and (digest := sha256_file(path)) != shard.sha256:
            raise UserError(
                f"hidden-state shard {path} is corrupted: sha256 {digest[:12]}, the manifest says "
                f"{shard.sha256[:12]}: {self._fix}"
            )

    def _fetch(self, shard: ShardInfo) -> None:
        assert self.manifest.store is not None, "only a shard of a shared store can be fetched"
        remote_store.fetch(self.manifest.store, self.folder / shard.file, shard.sha256)

    def rows(self, split: str | None = None) -> list[RowInfo]:
        return [row for row in self.manifest.rows if split in (None, row.split)]

    def read(self, row: RowInfo) -> tuple[Tensor, Tensor, Tensor]:
        """(token_ids int64 [T], aux [T, A * H], final [T, H]) of a row, states in the stored dtype.

        Raises UserError naming the row where a state is not finite or the shard cannot be read.
        """
        end = row.offset + row.length
        try:
            shard = self._shard(row.shard)
            token_ids, aux, final = (shard.get_slice(key)[row.offset : end] for key in ("token_ids", "aux", "final"))
        except Exception as error:  # safetensors raises its own types for a damaged header or file
            path = self.folder / self.manifest.shards[row.shard].file
            raise UserError(f"row {row.id} cannot be read from {path} ({error}): {self._fix}") from None
        check_finite(
            [row.id], [row.length], torch.isfinite(aux).all(-1) & torch.isfinite(final).all(-1), self.manifest.dtype
        )
        return token_ids.long(), aux, final

    def _shard(self, number: int) -> Any:
        if number not in self._handles:
            shard = self.manifest.shards[number]
            path = self.folder / shard.file
            if not path.exists() and self.manifest.store is not None:
                self._fetch(shard)
            self._handles[number] = safe_open(path, framework="pt")
        return self._handles[number]


def _check_expected(path: Path, manifest: Manifest, expect: Expected) -> None:
    for field, wanted in vars(expect).items():
        got = getattr(manifest, field)
        if got != wanted:
            got, wanted = (value[:12] if field.endswith("digest") else value for value in (got, wanted))
            raise UserError(
                f"hidden states of {path} have {field} {got}, expected {wanted}: "
                f"run `dvc repro -f extract@{manifest.family}`"
            )


def check_finite(ids: Sequence[str], lengths: Sequence[int], finite: Tensor, dtype: str) -> None:
    """Raise UserError naming the row whose tokens (`finite` bool [sum of lengths]) have a NaN or infinite state."""
    if bool(finite.all()):
        return
    for row_id, part in zip(ids, finite.split(list(lengths)), strict=True):
        if not bool(part.all()):
            raise UserError(
                f"extract: states of row {row_id} are NaN or infinite in {dtype}: set extract.dtype (and target.dtype) "
                "to one with a wider range, such as bfloat16 or float32, or drop that conversation"
            )


@dataclass(frozen=True)
class PlannedShard:
    """Rows of one shard in order; `key` identifies the store they belong to."""

    number: int
    rows: tuple[RowInfo, ...]
    key: str
    store: str | None = None
    """URL of the folder that the file is moved to; only its record stays. None: the file stays."""

    @property
    def file(self) -> str:
        return f"shard-{self.number:05d}.safetensors"

    @property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)

    @property
    def _plan_digest(self) -> str:
        return sha256_json([self.key, [row.model_dump() for row in self.rows]])

    def finished(self, folder: Path, *, verify: bool = True) -> ShardInfo | None:
        """The shard as an earlier run left it, None where it is absent, of another plan, or damaged: by its digest, or
        without `verify`, and in a shared store, by its size alone.
        """
        path, sidecar = folder / self.file, folder / f"{self.file}.json"
        if not sidecar.exists() or not (path.exists() or self.store):
            return None
        record = read_json(sidecar, what="shard record", made_by="dvc repro -f extract@<family>")
        if record["plan"] != self._plan_digest:
            return None
        info = ShardInfo.model_validate(record["shard"])
        if self.store is not None:
            return info if remote_store.size(self.store, self.file) == info.bytes else None
        whole = sha256_file(path) == info.sha256 if verify else path.stat().st_size == info.bytes
        return info if whole else None

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> ShardInfo:
        """Write the shard, then its sidecar: a shard without sidecar was not finished."""
        (folder / f"{self.file}.json").unlink(missing_ok=True)
        with atomic_path(folder / self.file) as temporary:
            save_file(tensors, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            digest, size = sha256_file(temporary), temporary.stat().st_size
        info = ShardInfo(file=self.file, sha256=digest, rows=len(self.rows), tokens=self.num_tokens, bytes=size)
        if self.store is not None:
            remote_store.upload(folder / self.file, self.store)
            (folder / self.file).unlink()
        write_json(folder / f"{self.file}.json", {"plan": self._plan_digest, "shard": info.model_dump()})
        return info


@dataclass
class Captured:
    """States of consecutive rows of one shard, packed: token_ids [n], aux [n, A * H], final [n, H], finite bool [n]."""

    shard: PlannedShard
    rows: Sequence[RowInfo]
    token_ids: Tensor
    aux: Tensor
    final: Tensor
    finite: Tensor


class ShardWriter:
    """Copies captured states to the host and writes shards in a thread, behind a bounded queue.

    Use as a context manager: leaving it waits for what is queued. An error in the thread surfaces at the next `put` or
    at the end. `done` holds the finished shards by number; `written` is told of each, in the thread.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        *,
        max_pending: int = 4,
        written: Callable[[PlannedShard], None] = lambda shard: None,
    ) -> None:
        self.folder, self.dtype, self.written = folder, dtype, written
        self.done: dict[int, ShardInfo] = {}
        self._error: BaseException | None = None
        self._queue: queue.Queue[Captured | None] = queue.Queue(max_pending)
        self._thread = threading.Thread(target=self._work, name="shard-writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def put(self, captured: Captured) -> None:
        """Queue states; batches of a shard come in order and complete it before the next one begins."""
        if self._error is not None:
            raise self._error
        self._queue.put(captured)

    def _work(self) -> None:
        tensors: dict[str, Tensor] = {}
        filled = 0
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drain, so that a producer at a full queue is not left hanging
            try:
                if not tensors:
                    tensors, filled = _empty_shard(item), 0
                filled = _fill(tensors, item, filled, self.dtype)
                if filled == item.shard.num_tokens:
                    self.done[item.shard.number] = item.shard.write(self.folder, tensors)
                    self.written(item.shard)
                    tensors = {}
            except BaseException as error:
                self._error = error


def _empty_shard(first: Captured) -> dict[str, Tensor]:
    n = first.shard.num_tokens
    return {
        "token_ids": torch.empty(n, dtype=torch.int32),
        "aux": torch.empty(n, first.aux.shape[1], dtype=first.aux.dtype),
        "final": torch.empty(n, first.final.shape[1], dtype=first.final.dtype),
    }


def _fill(tensors: dict[str, Tensor], item: Captured, filled: int, dtype: str) -> int:
    lengths = [row.length for row in item.rows]
    assert item.rows[0].offset == filled, "batches of a shard must come in order"
    check_finite([row.id for row in item.rows], lengths, item.finite.cpu(), dtype)
    end = filled + sum(lengths)
    tensors["token_ids"][filled:end] = item.token_ids
    tensors["aux"][filled:end] = item.aux
    tensors["final"][filled:end] = item.final
    return end
