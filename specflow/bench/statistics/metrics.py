"""Definitions of the benchmark, as pure functions of per-request records; the identities hold or an assertion fails.

Acceptance length: tokens emitted per verification step, the target's own included, before the cut of a last step
= 1 + accepted / steps (pooled over steps) = 1 + sum of survival. Survival_i: share of all steps whose first i
drafts were accepted (a step that proposed fewer counts as not accepted); of a tree, whose accepted path has at least
i nodes. Speed: generated token ids over wall time of whole requests, prefill included on both sides; `decode_*` names
exclude the prefill and the token that it yields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specflow.bench.statistics.records import Pair, Record
from specflow.results.schema import Cost, Divergence


@dataclass(frozen=True)
class Acceptance:
    num_steps: int
    num_drafted: int
    """Tokens drafted; of trees all nodes, of which a step can accept one path only."""
    num_accepted: int
    length: float
    """Pooled acceptance length."""
    macro_length: float
    """Mean over requests of each one's acceptance length."""
    survival: list[float]
    conditional: list[float]
    """Survival_i / survival_{i-1}, survival_0 = 1; 0 where nothing got that far."""
    histogram: dict[int, int]
    """Steps by acceptance length."""

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted. Of a tree this is the share of its nodes on an accepted path: low by construction, and
        no measure of the draft's quality beside a chain's."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


def histogram_of(accepted: Iterable[int]) -> dict[int, int]:
    """Steps by acceptance length (accepted drafts + 1), ascending."""
    return dict(sorted(Counter(count + 1 for count in accepted).items()))


def survival_of(histogram: Mapping[int, int], num_speculative_tokens: int) -> list[float]:
    """Share of steps that accepted at least i drafts, i = 1..K; lengths that never occurred are no gaps in it."""
    total = sum(histogram.values())
    return [
        sum(count for length, count in histogram.items() if length > i) / total if total else 0.0
        for i in range(1, num_speculative_tokens + 1)
    ]


def conditional_of(survival: Sequence[float]) -> list[float]:
    return [now / before if before > 0 else 0.0 for now, before in zip(survival, [1.0, *survival], strict=False)]


def acceptance(records: Sequence[Record], num_speculative_tokens: int) -> Acceptance:
    """Pooled and macro acceptance of one engine's records. Requests without a step count in neither.

    `num_speculative_tokens` limits what a step can accept: K of a chain, the depth of a tree.
    """
    steps = [step for record in records for step in record.steps]
    histogram = histogram_of(accepted for _, accepted in steps)
    survival = survival_of(histogram, num_speculative_tokens)
    num_accepted = sum(accepted for _, accepted in steps)
    length = 1.0 + num_accepted / len(steps) if steps else 1.0
    assert all(accepted <= min(drafted, num_speculative_tokens) for drafted, accepted in steps), "accepted over drafted"
    assert abs(length - (1.0 + sum(survival))) < 1e-9, f"{length} is not 1 + sum of survival {survival}"
    emitted = sum(len(record.token_ids) - 1 + record.num_cut for record in records)  # the prefill's token is no step's
    assert emitted == sum(length * count for length, count in histogram.items()), f"{emitted} tokens, {histogram}"
    by_request = [1.0 + sum(a for _, a in record.steps) / len(record.steps) for record in records if record.steps]
    return Acceptance(
        num_steps=len(steps),
        num_drafted=sum(drafted for drafted, _ in steps),
        num_accepted=num_accepted,
        length=length,
        macro_length=float(np.mean(by_request)) if by_request else 1.0,
        survival=survival,
        conditional=conditional_of(survival),
        histogram=histogram,
    )


def tok_s(records: Sequence[Record]) -> float:
    """Generated tokens per second of whole requests, prefill included."""
    return _rate(sum(len(r.token_ids) for r in records), sum(r.total_s for r in records))


def decode_tok_s(records: Sequence[Record]) -> float:
    """Tokens after the first per second after the prefill."""
    return _rate(sum(len(r.token_ids) - 1 for r in records), sum(r.decode_s for r in records))


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def speedup(pairs: Sequence[Pair]) -> float | None:
    """Ratio of sums: the engine's tokens per second over the baseline's, both over all pairs. None without a pair."""
    base = tok_s([b for b, _ in pairs])
    return tok_s([e for _, e in pairs]) / base if base > 0 else None


def speedup_mean_of_ratios(pairs: Sequence[Pair]) -> float | None:
    """Mean over pairs of each one's ratio of tokens per second: every request weighs the same, however long."""
    return float(np.mean([tok_s([e]) / tok_s([b]) for b, e in pairs])) if pairs else None


def decode_speedup(pairs: Sequence[Pair]) -> float | None:
    """Ratio of sums without the prefills. None where no baseline decoded a second token."""
    base = decode_tok_s([b for b, _ in pairs])
    return decode_tok_s([e for _, e in pairs]) / base if base > 0 else None


def losslessness(pairs: Sequence[Pair]) -> tuple[float, Divergence | None]:
    """Share of pairs with identical token ids, and where the first other one parts from the baseline."""
    same = 0
    first: Divergence | None = None
    for base, engine in pairs:
        if base.token_ids == engine.token_ids:
            same += 1
        elif first is None:
            position = divergence(base.token_ids, engine.token_ids)
            first = Divergence(
                set=base.set,
                question_id=base.question_id,
                turn=base.turn,
                sample=base.sample,
                repeat=base.repeat,
                position=position,
                expected=base.token_ids[position] if position < len(base.token_ids) else None,
                got=engine.token_ids[position] if position < len(engine.token_ids) else None,
            )
    return same / len(pairs) if pairs else 1.0, first


def divergence(expected: Sequence[int], got: Sequence[int]) -> int:
    pairs = zip(expected, got, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))


def repeats_equal(records: Sequence[Record]) -> bool:
    """Whether one engine gave each request the same token ids in every repeat."""
    answers: dict[tuple[str, str, int, int], list[int]] = {}
    return all(answers.setdefault(record.request, record.token_ids) == record.token_ids for record in records)


def cost(baseline: Sequence[Record], engine: Sequence[Record], acceptance_length: float | None) -> Cost:
    """Milliseconds of a plain step, of a verification and of a proposal, and the decode speedup that they predict."""

    def mean_ms(seconds: float, records: Sequence[Record]) -> float | None:
        steps = sum(len(r.steps) for r in records)
        return 1e3 * seconds / steps if steps else None

    target = mean_ms(sum(r.verify_s for r in baseline), baseline)
    verify, draft = mean_ms(sum(r.verify_s for r in engine), engine), mean_ms(sum(r.draft_s for r in engine), engine)
    predicted = None
    if target is not None and verify is not None and draft is not None and acceptance_length is not None:
        predicted = acceptance_length * target / (draft + verify) if draft + verify > 0 else None
    decode_s, inside = sum(r.decode_s for r in engine), [r.model_s for r in engine if r.model_s is not None]
    return Cost(
        t_target_ms=target,
        t_verify_ms=verify,
        t_draft_ms=draft,
        predicted_speedup=predicted,
        outside_share=1.0 - sum(inside) / decode_s if decode_s > 0 and len(inside) == len(engine) else None,
    )
