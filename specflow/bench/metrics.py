"""Definitions of the benchmark, as pure functions of per-request records; the identities hold or an assertion fails.

Acceptance length: tokens emitted per verification step, the target's own included, before the cut of a last step
= 1 + accepted / steps (pooled over steps) = 1 + sum of survival. Survival_i: share of all steps whose first i
drafts were accepted (a step that proposed fewer counts as not accepted). Speed: generated token ids over wall time of
whole requests, prefill included on both sides; `decode_*` names exclude the prefill and the token that it yields.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Record:
    """One request of one engine in one repeat."""

    set: str
    question_id: str
    category: str
    turn: int
    repeat: int
    engine: str
    """baseline, draft or lookup."""
    order: int
    """Place among the engines that ran this request in this repeat."""
    num_prompt_tokens: int
    token_ids: list[int]
    """Generated ids."""
    steps: list[list[int]]
    """[drafted, accepted] of each verification step."""
    num_cut: int
    """Verified tokens of the last step beyond max_new_tokens or the end of the turn."""
    prefill_s: float
    draft_s: float
    verify_s: float
    decode_s: float
    finish_reason: str

    def __post_init__(self) -> None:
        emitted = 1 + sum(accepted + 1 for _, accepted in self.steps) - self.num_cut
        assert len(self.token_ids) == emitted, f"{self.key}: {len(self.token_ids)} tokens, steps say {emitted}"

    @property
    def request(self) -> tuple[str, str, int]:
        return self.set, self.question_id, self.turn

    @property
    def key(self) -> str:
        return f"{self.set}/{self.question_id}/{self.turn}/{self.repeat}/{self.engine}"

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    def to_json(self) -> dict[str, Any]:
        return {"id": self.key, **asdict(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        return cls(**{name: value for name, value in row.items() if name != "id"})


@dataclass(frozen=True)
class Acceptance:
    num_steps: int
    num_drafted: int
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
    """Pooled and macro acceptance of one engine's records. Requests without a step count in neither."""
    steps = [step for record in records for step in record.steps]
    histogram = histogram_of(accepted for _, accepted in steps)
    survival = survival_of(histogram, num_speculative_tokens)
    num_accepted = sum(accepted for _, accepted in steps)
    length = 1.0 + num_accepted / len(steps) if steps else 1.0
    assert all(accepted <= drafted <= num_speculative_tokens for drafted, accepted in steps), "accepted over drafted"
    assert abs(length - (1.0 + sum(survival))) < 1e-9, f"{length} is not 1 + sum of survival {survival}"
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


Pair = tuple[Record, Record]


def paired(baseline: Sequence[Record], engine: Sequence[Record]) -> list[Pair]:
    """Records of both engines for the same request and repeat. Repeats that one engine did not run are left out."""
    by_run = {(*record.request, record.repeat): record for record in baseline}
    return [(by_run[run], r) for r in engine if (run := (*r.request, r.repeat)) in by_run]


def speedup(pairs: Sequence[Pair]) -> float:
    """Ratio of sums: the engine's tokens per second over the baseline's, both over all pairs."""
    base = tok_s([b for b, _ in pairs])
    return tok_s([e for _, e in pairs]) / base if base > 0 else 0.0


def speedup_mean_of_ratios(pairs: Sequence[Pair]) -> float:
    """Mean over pairs of each one's ratio of tokens per second: every request weighs the same, however long."""
    return float(np.mean([tok_s([e]) / tok_s([b]) for b, e in pairs])) if pairs else 0.0


def speedup_interval(pairs: Sequence[Pair], *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of `speedup`, resampling questions (all their turns and repeats together).

    With one question the interval has no width; callers must not read certainty into that.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    for base, engine in pairs:
        parts = (len(base.token_ids), base.total_s, len(engine.token_ids), engine.total_s)
        cluster = sums[base.set, base.question_id]
        for i, part in enumerate(parts):
            cluster[i] += part
    if not sums:
        return 0.0, 0.0
    table = np.array(list(sums.values()))
    chosen = np.random.default_rng(seed).integers(len(table), size=(NUM_RESAMPLES, len(table)))
    base_tokens, base_s, tokens, seconds = table[chosen].sum(axis=1).T
    low, high = np.quantile((tokens / seconds) / (base_tokens / base_s), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def losslessness(pairs: Sequence[Pair]) -> tuple[float, dict[str, Any] | None]:
    """Share of pairs with identical token ids, and where the first other one parts from the baseline."""
    same, first = 0, None
    for base, engine in pairs:
        if base.token_ids == engine.token_ids:
            same += 1
        elif first is None:
            position = _divergence(base.token_ids, engine.token_ids)
            first = {
                "set": base.set,
                "question_id": base.question_id,
                "turn": base.turn,
                "repeat": base.repeat,
                "position": position,
                "expected": base.token_ids[position] if position < len(base.token_ids) else None,
                "got": engine.token_ids[position] if position < len(engine.token_ids) else None,
            }
    return same / len(pairs) if pairs else 1.0, first


def _divergence(expected: Sequence[int], got: Sequence[int]) -> int:
    pairs = zip(expected, got, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))


def summarise(
    records: Sequence[Record], *, num_speculative_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """The summary of one prompt set, or of several pooled: everything the report shows of it.

    `lossless` is None under sampling, where outputs are drawn and may differ: there a test on distributions speaks.
    """
    engines: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        engines[record.engine].append(record)
    summary = _engine_summary(engines["baseline"], engines["draft"], num_speculative_tokens)
    pairs = paired(engines["baseline"], engines["draft"])
    lossless_rate, first_divergence = losslessness(pairs)
    categories = sorted({record.category for record in records})
    return {
        **summary,
        "speedup_ci": list(speedup_interval(pairs, seed=seed)),
        "num_questions": len({(b.set, b.question_id) for b, _ in pairs}),
        "lossless": lossless_rate == 1.0 if temperature == 0.0 else None,
        "lossless_rate": lossless_rate if temperature == 0.0 else None,
        "first_divergence": first_divergence if temperature == 0.0 else None,
        "num_length_limited": len({r.request for r in engines["baseline"] if r.finish_reason == "length"}),
        "by_category": {
            category: _engine_summary(
                [r for r in engines["baseline"] if r.category == category],
                [r for r in engines["draft"] if r.category == category],
                num_speculative_tokens,
            )
            for category in categories
        },
        "lookup": _lookup_summary(engines["baseline"], engines["lookup"], num_speculative_tokens, temperature),
    }


def _engine_summary(
    baseline: Sequence[Record], engine: Sequence[Record], num_speculative_tokens: int
) -> dict[str, Any]:
    accepted = acceptance(engine, num_speculative_tokens)
    pairs = paired(baseline, engine)
    plain = [b for b, _ in pairs]
    decode, plain_decode = decode_tok_s(engine), decode_tok_s(plain)
    return {
        "num_requests": len({record.request for record in engine}),
        "num_tokens": sum(len(record.token_ids) for record in engine),
        "num_steps": accepted.num_steps,
        "acceptance_length": accepted.length,
        "acceptance_length_macro": accepted.macro_length,
        "draft_acceptance_rate": accepted.num_accepted / accepted.num_drafted if accepted.num_drafted else 0.0,
        "survival": accepted.survival,
        "conditional": accepted.conditional,
        "histogram": {str(length): count for length, count in accepted.histogram.items()},
        "tok_s": tok_s(engine),
        "baseline_tok_s": tok_s(plain),
        "speedup": speedup(pairs),
        "speedup_mean_of_ratios": speedup_mean_of_ratios(pairs),
        "decode_tok_s": decode,
        "baseline_decode_tok_s": plain_decode,
        "decode_speedup": decode / plain_decode if plain_decode > 0 else 0.0,
    }


def _lookup_summary(
    baseline: Sequence[Record], lookup: Sequence[Record], num_speculative_tokens: int, temperature: float
) -> dict[str, Any] | None:
    if not lookup:
        return None
    summary = _engine_summary(baseline, lookup, num_speculative_tokens)
    rate, _ = losslessness(paired(baseline, lookup))
    kept = ("num_requests", "acceptance_length", "tok_s", "baseline_tok_s", "speedup", "decode_speedup")
    return {**{name: summary[name] for name in kept}, "lossless": rate == 1.0 if temperature == 0.0 else None}


def cost(baseline: Sequence[Record], engine: Sequence[Record], acceptance_length: float) -> dict[str, float]:
    """Milliseconds of a plain step, of a verification and of a proposal, and the decode speedup that they predict.

    `outside_share` is the part of the engine's decode time that is neither drafting nor verifying.
    """
    t_target = _rate(sum(r.verify_s for r in baseline), sum(len(r.steps) for r in baseline))
    steps = sum(len(r.steps) for r in engine)
    t_verify, t_draft = _rate(sum(r.verify_s for r in engine), steps), _rate(sum(r.draft_s for r in engine), steps)
    decode_s = sum(r.decode_s for r in engine)
    return {
        "t_target_ms": 1e3 * t_target,
        "t_verify_ms": 1e3 * t_verify,
        "t_draft_ms": 1e3 * t_draft,
        "predicted_speedup": _rate(acceptance_length * t_target, t_draft + t_verify),
        "outside_share": 1.0 - _rate(sum(r.draft_s + r.verify_s for r in engine), decode_s) if decode_s > 0 else 0.0,
    }


def verdict(overall: Mapping[str, Any], costs: Mapping[str, float], num_speculative_tokens: int) -> str:
    """One sentence: pays, does not pay, or no conclusion and why."""
    length, (low, high) = overall["acceptance_length"], overall["speedup_ci"]
    because = (
        f"acceptance length x t_target / (t_draft + t_verify) = {length:.2f} x {costs['t_target_ms']:.1f} ms / "
        f"({costs['t_draft_ms']:.1f} + {costs['t_verify_ms']:.1f} ms) = {costs['predicted_speedup']:.2f}"
    )
    measured = (
        f"{overall['speedup']:.2f}x (95% CI {low:.2f} to {high:.2f}) over {overall['num_questions']} questions "
        f"at K = {num_speculative_tokens}"
    )
    if overall["lossless"] is False:
        where = overall["first_divergence"]
        return (
            f"No conclusion: greedy output differs from the target's own in {1 - overall['lossless_rate']:.1%} of the "
            f"runs, first in {where['set']}/{where['question_id']} at token {where['position']}; measured {measured}."
        )
    if length < 1.02:
        reason = f"acceptance length is {length:.2f}, which means wrong weights or template"
        return f"No conclusion: {reason}; measured {measured}."
    if overall["num_questions"] < 2:
        return f"No conclusion: one question gives no interval; measured {measured}, {because}."
    if low <= 1.0 <= high:
        return f"No conclusion: the interval of the speedup includes 1; measured {measured}, {because}."
    return f"{'Pays' if low > 1.0 else 'Does not pay'}: {measured}, because {because}."
