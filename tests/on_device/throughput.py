"""Speed, memory and share of the peak of a training step, as a row of a Markdown table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.training import useful_flops
from specflow.config import Train
from specflow.device import execution, wait
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.training.checkpoint import Checkpoints
from specflow.training.loop import Trainer
from specflow.training.packing import ROUND_ROWS, Batch, Document, pack
from tests.on_device.training import Held

LLAMA_8B = Eagle3Config(
    hidden_size=4096,
    target_hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    vocab_size=128256,
    draft_vocab_size=32000,
    aux_layer_ids=[2, 16, 29],
)


@dataclass(frozen=True)
class Speed:
    """Of one document, all of whose tokens are supervised, an optimizer step included; loading is not."""

    tokens: int
    ttt_steps: int
    ms: float
    """Of a step, median."""
    tflops: float
    """Useful ones per second: what the definition's products need, forward and backward."""
    peak_share: float
    """Of what a square product of the same dtype reaches on the same device in the same minute."""
    memory_gb: float
    """Peak of what torch had allocated, in 10^9 bytes; 0 on a CPU."""

    @property
    def tok_s(self) -> float:
        return 1e3 * self.tokens / self.ms


def median_s(runs: int, device: torch.device, work: Callable[[], object]) -> float:
    """After two that are not counted: compilation, workspaces."""
    times = []
    for number in range(2 + runs):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_trainer(config: Eagle3Config, device: torch.device, ttt_steps: int) -> Trainer:
    torch.manual_seed(0)
    draft = Eagle3Draft(config)
    draft.t2d[: config.draft_vocab_size] = True
    dtype = execution(device).training_dtype
    table = 0.02 * torch.randn(config.vocab_size, config.target_hidden_size, device=device, dtype=dtype)
    states = torch.zeros(8, draft.fc.in_features), torch.zeros(8, config.target_hidden_size)
    tiny = Document("x", torch.zeros(8, dtype=torch.int64), *states, [(0, 8)])
    return Trainer(
        stage="train_offline",
        draft=draft,
        embedding=table,
        full_head=table,
        features=Held(train=[tiny], eval=[tiny]),
        config=Train(ttt_steps=ttt_steps, fit_tokens=0),
        checkpoints=Checkpoints(Path("/nonexistent")),
        log=lambda values, step: None,
        device=device,
    )


def make_batch(config: Eagle3Config, device: torch.device, tokens: int, ttt_steps: int) -> Batch:
    """As `Trainer._load` leaves it."""
    dtype, width = execution(device).training_dtype, config.target_hidden_size
    ids = torch.randint(config.vocab_size, (tokens,))
    aux = torch.randn(tokens, len(config.aux_layer_ids) * width, device=device, dtype=dtype)
    final = torch.randn(tokens, width, device=device, dtype=dtype)
    return pack([Document("x", ids, aux, final, [(0, tokens)])], ttt_steps, ROUND_ROWS).to(device)


def measure(trainer: Trainer, tokens: int, *, runs: int = 5, peak_size: int = 8192) -> Speed:
    device, config = trainer.device, trainer.draft.config
    batch = make_batch(config, device, tokens, trainer.config.ttt_steps)
    a = torch.randn(peak_size, peak_size, device=device, dtype=execution(device).training_dtype)
    peak = 2 * peak_size**3 / median_s(runs, device, lambda: a @ a)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_s(runs, device, lambda: trainer.step([batch], 0))
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    flops = useful_flops(config, batch) / seconds
    return Speed(tokens, trainer.config.ttt_steps, 1e3 * seconds, flops / 1e12, flops / peak, memory)


def table(speeds: list[Speed]) -> str:
    """Markdown."""
    lines = [
        "| tokens | TTT steps | ms a step | tok/s | useful TFLOP/s | of the measured peak | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in speeds:
        lines.append(
            f"| {s.tokens:,} | {s.ttt_steps} | {s.ms:.1f} | {s.tok_s:,.0f} | {s.tflops:.1f} | {s.peak_share:.0%} | "
            f"{s.memory_gb:.1f} GB |"
        )
    return "\n".join(lines)
