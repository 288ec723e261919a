"""vLLM's hidden-state connector for machines without a GPU. Runs inside the engine, imports nothing of specflow.

The stock connector (vLLM 0.32) copies through pinned memory and asks a CUDA event when the copy is done; neither exists
on CPU. Here the copy is a plain gather. The protocol to the reader is the stock one: `<request>.safetensors` and beside
it `<request>.safetensors.lock`, locked exclusively from before the answer goes out until the file is written.
This folder holds nothing else, so it can stand on the engine's PYTHONPATH.

The method drafts every sampled token once more, so a server that also samples verifies drafts. There the CPU build of
0.32 reads temperatures that nobody wrote (its expand kernel fills an int64 copy and drops it): `expand` replaces it.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)
from vllm.triton_utils.dispatcher import register_kernels


def expand(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """`input` [B] into `output` [N], in its own dtype: value i as often as request i has tokens (cumulated in [B]).

    The parameters are called as the kernel's are, by which vLLM passes them.
    """
    counts = cu_num_tokens_ptr.diff(prepend=cu_num_tokens_ptr.new_zeros(1))
    output_ptr.copy_(input_ptr.masked_fill(input_ptr == replace_from, replace_to).repeat_interleave(counts))


class _CopyDone:
    """Stands for the event of a copy that is over when it returns."""

    def query(self) -> bool:
        return True


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """The stock connector, but for how a finished request's states leave the cache."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        starts = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (starts + torch.arange(self._block_size)).flatten()[: len(pending.token_ids)]
        # A gather copies: the blocks may be reused as soon as this returns.
        states = extract_from_kv_cache(self._kv_cache, slots, len(slots)).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id, None)
        future = self._executor.submit(_write, tensors, pending.filename, lock)
        self._req_copy_events[pending.req_id] = _CopyDone()
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))


def _write(tensors: dict[str, torch.Tensor], filename: str, lock: int | None) -> None:
    """The file under its own name only when it is whole; then the reader's lock is let go."""
    try:
        os.makedirs(os.path.dirname(filename), exist_ok=True)  # noqa: PTH103, PTH120 - as the stock connector
        save_file(tensors, f"{filename}.tmp")
        os.replace(f"{filename}.tmp", filename)  # noqa: PTH105
    finally:
        if lock is not None:
            os.close(lock)
