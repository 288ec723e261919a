"""Definitions of the benchmark through servers, as pure functions of its records; acceptance is statistics'.

TTFT: from sending a request to its first token. E2E: to its last token. TPOT: (E2E - TTFT) / (tokens - 1), requests of
one token left out. ITL: gaps between the messages that hold tokens; with a draft a message holds several tokens, so
ITL is burstier and TPOT is the one to compare. Output tok/s: tokens of a block over its wall time, first sent to last
answered. Per user: mean of 1 / TPOT. Speedup at a concurrency: output tok/s with the draft over those without.
Percentiles: linear interpolation between order statistics (Hyndman and Fan's type 7, numpy's default, what
`vllm bench serve` uses).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from specflow.bench.statistics import metrics
from specflow.bench.statistics.records import Record, paired
from specflow.errors import UserError
from specflow.results.served import Level, Percentiles, ServedAcceptance, Side, SideResult

COUNTERS = {
    "vllm:spec_decode_num_drafts_total": "num_steps",
    "vllm:spec_decode_num_draft_tokens_total": "num_drafted",
    "vllm:spec_decode_num_accepted_tokens_total": "num_accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": "accepted_at",
}
"""vLLM's counters by our names; its `_created` samples are times, not counts."""


@dataclass(frozen=True)
class ServedRecord:
    """One request of one server in one block."""

    set: str
    question_id: str
    category: str
    turn: int
    repeat: int
    """How often this request was asked before at this concurrency."""
    engine: str
    """baseline or draft."""
    concurrency: int
    num_prompt_tokens: int
    server_prompt_tokens: int | None
    num_tokens: int
    token_ids: list[int] | None
    """Generated ids; None where the server sends none, and then `text` stands for them."""
    text: str | None
    steps: list[list[int]] | None
    """[drafted, accepted] of each verification step; None where the server does not tell."""
    started_s: float
    """Since the block began."""
    chunk_s: list[float]
    """Arrival of each message with tokens since the request was sent."""
    finish_reason: str
    error: str | None = None

    @property
    def key(self) -> str:
        return f"{self.set}/{self.question_id}/{self.turn}/{self.engine}/{self.concurrency}/{self.repeat}"

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0]

    @property
    def e2e_s(self) -> float:
        return self.chunk_s[-1]

    @property
    def tpot_s(self) -> float | None:
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.key, **asdict(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ServedRecord:
        return cls(**{name: value for name, value in row.items() if name != "id"})

    def as_record(self) -> Record:
        """The same request as the in-process benchmark's metrics take it; draft_s and verify_s are not known.

        Without steps every token counts as a step of its own; without token ids the bytes of the text stand for them.
        """
        ids = self.token_ids if self.token_ids is not None else list((self.text or "").encode())
        steps = self.steps if self.steps is not None and self.token_ids is not None else [[0, 0]] * (len(ids) - 1)
        num_cut = 1 + sum(accepted + 1 for _, accepted in steps) - len(ids)
        if num_cut < 0:
            raise UserError(
                f"{self.key}: {len(ids)} tokens from {len(steps)} steps that accepted {sum(a for _, a in steps)}: "
                "the server's counts leave out steps (preempted or resumed requests?), so no acceptance can be stated"
            )
        return Record(
            set=self.set,
            question_id=self.question_id,
            category=self.category,
            turn=self.turn,
            repeat=self.repeat,
            engine=self.engine,
            order=0,
            num_prompt_tokens=self.num_prompt_tokens,
            token_ids=ids,
            steps=steps,
            num_cut=num_cut,
            prefill_s=self.ttft_s,
            draft_s=0.0,
            verify_s=0.0,
            decode_s=self.e2e_s - self.ttft_s,
            finish_reason=self.finish_reason,
        )


@dataclass(frozen=True)
class Block:
    """All requests of one server at one concurrency, once through."""

    engine: Side
    concurrency: int
    repeat: int
    wall_s: float
    records: list[ServedRecord]
    counters: dict[str, float] | None
    """What the server's counters grew by; None where it has none."""

    @property
    def answered(self) -> list[ServedRecord]:
        return [record for record in self.records if record.error is None]


def percentile(values: Sequence[float], rank: float) -> float | None:
    """The module's one definition; `rank` in percent. None of no values."""
    return float(np.percentile(values, rank, method="linear")) if values else None


def latencies(values: Sequence[float]) -> Percentiles:
    """Percentiles in milliseconds of values in seconds."""
    p50, p90, p99 = (_ms(percentile(values, rank)) for rank in (50, 90, 99))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def side(blocks: Sequence[Block], num_gpus: int | None) -> SideResult:
    """Speed of one server at one concurrency over its blocks; failed requests give no token and no latency."""
    records = [record for block in blocks for record in block.answered]
    seconds = sum(block.wall_s for block in blocks)
    num_tokens = sum(record.num_tokens for record in records)
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    gaps = [later - now for r in records for now, later in pairwise(r.chunk_s)]
    tok_s = num_tokens / seconds if seconds > 0 else 0.0
    return SideResult(
        num_requests=sum(len(block.records) for block in blocks),
        num_errors=sum(len(block.records) - len(block.answered) for block in blocks),
        num_tokens=num_tokens,
        seconds=seconds,
        tok_s=tok_s,
        tok_s_per_gpu=tok_s / num_gpus if num_gpus else None,
        user_tok_s=float(np.mean([1 / tpot for tpot in tpots if tpot > 0])) if any(tpots) else None,
        ttft_ms=latencies([record.ttft_s for record in records]),
        tpot_ms=latencies(tpots),
        itl_ms=latencies(gaps),
        e2e_ms=latencies([record.e2e_s for record in records]),
    )


def acceptance(blocks: Sequence[Block], num_speculative_tokens: int) -> ServedAcceptance | None:
    """Acceptance of the draft's blocks: from each request's own steps, else from the differenced counters."""
    records = [record for block in blocks for record in block.answered]
    if records and all(record.steps is not None and record.token_ids is not None for record in records):
        found = metrics.acceptance([record.as_record() for record in records], num_speculative_tokens)
        return ServedAcceptance(
            source="requests",
            length=found.length,
            macro_length=found.macro_length,
            survival=found.survival,
            conditional=found.conditional,
            histogram=found.histogram,
            num_steps=found.num_steps,
            num_drafted=found.num_drafted,
            num_accepted=found.num_accepted,
        )
    counted = [block.counters for block in blocks]
    if not counted or any(not counters for counters in counted):
        return None
    return of_counters(summed([c for c in counted if c]), num_speculative_tokens)


def summed(counters: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for part in counters:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def of_counters(counters: Mapping[str, float], num_speculative_tokens: int) -> ServedAcceptance:
    """Acceptance of counters that were differenced: what can be said without the single requests."""
    steps = counters["num_steps"]
    survival = [counters.get(f"accepted_at_{i}", 0.0) / steps if steps else 0.0 for i in range(num_speculative_tokens)]
    length = 1.0 + counters["num_accepted"] / steps if steps else 1.0
    if abs(length - 1.0 - sum(survival)) > 1e-9:
        raise UserError(
            f"the server's counters give an acceptance length of {length:.4f} and survival rates {survival} for K = "
            f"{num_speculative_tokens}, which do not belong together: does it draft another number of tokens?"
        )
    return ServedAcceptance(
        source="counters",
        length=length,
        macro_length=None,
        survival=survival,
        conditional=metrics.conditional_of(survival),
        histogram=None,
        num_steps=int(steps),
        num_drafted=int(counters["num_drafted"]),
        num_accepted=int(counters["num_accepted"]),
    )


def parse_counters(text: str) -> dict[str, float] | None:
    """vLLM's speculation counters from the text of /metrics, summed over engines. None where there are none."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (name := COUNTERS.get(sample.name)) is not None:
                found[f"{name}_{sample.labels['position']}" if name == "accepted_at" else name] += sample.value
    return dict(found) or None


def differenced(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float] | None:
    """What counters grew by. Raises UserError where one fell: the server was restarted in between."""
    if not after:
        return None
    grown = {name: value - (before or {}).get(name, 0.0) for name, value in after.items()}
    if any(value < 0 for value in grown.values()):
        raise UserError("the server's counters fell during a block: it was restarted; run the benchmark again")
    return grown


def vllm_steps(speculation: Mapping[str, Any] | None, num_tokens: int) -> list[list[int]] | None:
    """Steps from vLLM's per-request metrics; of a request that ended with its first token there are none to tell."""
    if speculation is None:
        return [] if num_tokens == 1 else None
    if not speculation["num_spec_steps"]:
        return []
    accepted, drafted = speculation.get("per_step_accepted"), speculation.get("per_step_drafted")
    if accepted is not None and drafted is not None:
        return [[d, a] for d, a in zip(drafted, accepted, strict=True)]
    if speculation["num_draft_tokens"] != speculation["num_spec_steps"] * speculation["num_spec_tokens"]:
        return None  # some steps drafted fewer, and a histogram does not say which
    return _steps_of(speculation["acceptance_histogram"], speculation["num_spec_tokens"])


def sglang_steps(
    meta: Mapping[str, Any] | None, num_tokens: int, num_speculative_tokens: int
) -> list[list[int]] | None:
    """Steps from SGLang's counts of a request, in ascending order of what they accepted: it does not tell the true one.

    Its draft-token counts may include the root of each step, which was not drafted: then one is taken off a step. Its
    own `spec_accept_length` is answer tokens over steps, the prefill's token included, and is not used. Raises
    UserError where the counts contradict each other or K.
    """
    if meta is None:
        return [] if num_tokens == 1 else None
    steps = int(meta["spec_verify_ct"])
    histogram = _first(meta, "spec_correct_drafts_histogram", "spec_accept_histogram")
    accepted = _first(meta, "spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
    drafted = _first(meta, "spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
    if histogram is None:
        return None
    if drafted is not None and drafted == steps * (num_speculative_tokens + 1):
        drafted -= steps
    same = sum(histogram) == steps and len(histogram) <= num_speculative_tokens + 1
    same &= accepted in (None, sum(i * count for i, count in enumerate(histogram)))
    if not same or drafted not in (None, steps * num_speculative_tokens):
        raise UserError(
            f"SGLang counts {steps} steps, {drafted} drafted, {accepted} accepted and the histogram {histogram}, which "
            f"do not belong together at K = {num_speculative_tokens}: start it with --speculative-eagle-topk 1, "
            f"--speculative-num-steps {num_speculative_tokens} and --speculative-num-draft-tokens "
            f"{num_speculative_tokens + 1} (SGLang counts the root)"
        )
    return _steps_of(histogram, num_speculative_tokens)


def _first(meta: Mapping[str, Any], *names: str) -> Any:
    """SGLang has renamed its fields; the newest name that is there counts."""
    return next((meta[name] for name in names if meta.get(name) is not None), None)


def _steps_of(histogram: Sequence[int], drafted: int) -> list[list[int]]:
    return [[drafted, accepted] for accepted, count in enumerate(histogram) for _ in range(count)]


def level(blocks: Sequence[Block], num_speculative_tokens: int, *, greedy: bool, num_gpus: int | None) -> Level:
    """Everything about one concurrency; `blocks` are those of both servers at it."""
    baseline, draft = ([block for block in blocks if block.engine == engine] for engine in ("baseline", "draft"))
    plain, drafted = side(baseline, num_gpus), side(draft, num_gpus)
    by_repeat = [
        _ratio(side([d], None).tok_s, side([b], None).tok_s) for b in baseline for d in draft if b.repeat == d.repeat
    ]
    rate, first = metrics.losslessness(paired(_records(baseline), _records(draft)))
    return Level(
        concurrency=blocks[0].concurrency,
        baseline=plain,
        draft=drafted,
        speedup=_ratio(drafted.tok_s, plain.tok_s),
        speedup_range=(min(by_repeat), max(by_repeat)),
        acceptance=acceptance(draft, num_speculative_tokens),
        lossless_rate=rate if greedy else None,
        first_divergence=first if greedy else None,
    )


def _records(blocks: Sequence[Block]) -> list[Record]:
    return [_without_steps(record).as_record() for block in blocks for record in block.answered]


def _without_steps(record: ServedRecord) -> ServedRecord:
    """The record for comparing outputs alone, which no contradiction of counts may stand in the way of."""
    return replace(record, steps=None)


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0 else 0.0


def break_even(speedups: Mapping[int, float]) -> float | None:
    """The concurrency at which the draft stops paying: where the speedup first falls to 1, going up.

    Between two measured levels by linear interpolation over log2 of the concurrency. None where it pays at every
    level; the lowest level itself where it does not even pay there.
    """
    levels = sorted(speedups)
    if speedups[levels[0]] <= 1.0:
        return float(levels[0])
    for low, high in pairwise(levels):
        if speedups[high] <= 1.0:
            share = (speedups[low] - 1.0) / (speedups[low] - speedups[high])
            return float(2 ** (math.log2(low) + share * (math.log2(high) - math.log2(low))))
    return None
