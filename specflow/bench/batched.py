"""Speed of several requests at once: a chain draft against plain decoding at each batch size, on the same requests.

Both sides run through `generate_batch` with the same target and the same order of requests. A speculative step verifies
batch_size x (K + 1) tokens, so its gain falls as the batch grows and products become bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from specflow.bench.statistics.metrics import divergence
from specflow.decoding.batch import BatchChainDrafter, generate_batch
from specflow.decoding.generate import Generation, clock_of
from specflow.decoding.sampling import Sampling
from specflow.files import sha256_json
from specflow.results.schema import BatchDivergence, BatchRow
from specflow.targets.cached import CachedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specflow.drafters.eagle3 import Eagle3Draft

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """Requests that every side answers at every batch size, and how."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    eos_ids: Collection[int]
    num_speculative_tokens: int
    sampling: Sampling
    seed: int

    @property
    def max_length(self) -> int:
        return max(map(len, self.prompts)) + self.max_new_tokens + self.num_speculative_tokens

    def run(
        self, target: CachedTarget, drafter: BatchChainDrafter | None, repeat: int, *, warm_up: bool = False
    ) -> list[Generation]:
        """Answers to all prompts; of a warm-up to one batch of them, and short."""
        prompts = self.prompts[: target.num_rows] if warm_up else self.prompts
        seeds = [int(sha256_json([self.seed, repeat, number])[:12], 16) for number in range(len(prompts))]
        return generate_batch(
            target,
            prompts,
            max_new_tokens=min(WARM_UP_TOKENS, self.max_new_tokens) if warm_up else self.max_new_tokens,
            eos_ids=self.eos_ids,
            drafter=drafter,
            num_speculative_tokens=self.num_speculative_tokens if drafter else 0,
            sampling=self.sampling,
            generators=[torch.Generator(target.device).manual_seed(seed) for seed in seeds],
        )


@dataclass
class _Side:
    """What baseline or draft did at one batch size."""

    drafter: BatchChainDrafter | None
    seconds: float = 0.0
    passes: list[list[Generation]] = field(default_factory=list)
    """Answers by repeat and request."""

    @property
    def tok_s(self) -> float:
        return sum(len(done.token_ids) for answers in self.passes for done in answers) / self.seconds


def measure(
    model: PreTrainedModel, draft: Eagle3Draft, work: Workload, *, batch_sizes: Sequence[int], repeats: int
) -> list[BatchRow]:
    """Rows of summary.json's `batch`, one per batch size; speeds in tokens per second of wall time, prefills included.

    `model` is optimised for inference already. Both sides answer every prompt `repeats` times, in alternating order,
    after a warm-up that is not counted.
    """
    table, rows = model.get_input_embeddings().weight, []
    with tqdm(total=2 * repeats * len(batch_sizes), desc="bench: batches", unit="pass") as bar:
        for batch_size in batch_sizes:
            num_rows = min(batch_size, len(work.prompts))
            target = CachedTarget(
                model, num_rows=num_rows, max_length=work.max_length, aux_layer_ids=draft.config.aux_layer_ids
            )
            clock = clock_of(target.device)
            sides = [_Side(None), _Side(BatchChainDrafter(draft, table, num_rows, work.max_length))]
            for side in sides:
                work.run(target, side.drafter, 0, warm_up=True)
            for repeat in range(repeats):
                for side in sides if repeat % 2 == 0 else sides[::-1]:
                    began = clock()
                    side.passes.append(work.run(target, side.drafter, repeat))
                    side.seconds += clock() - began
                    bar.update()
            rows.append(_row(batch_size, work, target, *sides))
            target.close()
    return rows


def _row(batch_size: int, work: Workload, target: CachedTarget, baseline: _Side, draft: _Side) -> BatchRow:
    steps = [step for answers in draft.passes for done in answers for step in done.steps]
    lossless_rate, first_divergence = _losslessness(target, work, baseline, draft)
    return BatchRow(
        batch_size=batch_size,
        num_requests=len(work.prompts),
        num_speculative_tokens=work.num_speculative_tokens,
        tok_s=draft.tok_s,
        baseline_tok_s=baseline.tok_s,
        speedup=draft.tok_s / baseline.tok_s,
        acceptance_length=1.0 + sum(accepted for _, accepted in steps) / len(steps) if steps else None,
        lossless_rate=lossless_rate,
        first_divergence=first_divergence,
    )


def _losslessness(
    target: CachedTarget, work: Workload, baseline: _Side, draft: _Side
) -> tuple[float | None, BatchDivergence | None]:
    """Share of answers that equal the baseline's at the same batch size, and where the first other one parts from it.

    Its margin next to nothing means rounding, which differs with the number of rows of a product; anything else means
    an error. Both are None under sampling.
    """
    if not work.sampling.greedy:
        return None, None
    pairs = [
        (number, base.token_ids, mine.token_ids)
        for answers in zip(baseline.passes, draft.passes, strict=True)
        for number, (base, mine) in enumerate(zip(*answers, strict=True))
    ]
    other = [pair for pair in pairs if pair[1] != pair[2]]
    first = None
    if other:
        number, expected, got = other[0]
        at = divergence(expected, got)
        first = BatchDivergence(request=number, position=at, expected=None, got=None, margin=None)
        if at < min(len(expected), len(got)):
            target.lengths[0] = 0
            hidden = target.forward(torch.tensor([[*work.prompts[number], *expected[:at]]]))
            logits = target.logits(hidden[0, -1]).float()
            margin = float(logits[expected[at]] - logits[got[at]])
            first = BatchDivergence(request=number, position=at, expected=expected[at], got=got[at], margin=margin)
    return 1.0 - len(other) / len(pairs), first
