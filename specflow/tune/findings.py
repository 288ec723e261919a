"""What the search saw: each candidate's numbers, what they show, and the serving settings that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specflow.bench.statistics import metrics
from specflow.bench.statistics.records import BASELINE, DRAFT, Record, paired
from specflow.bench.statistics.summary import summary_of
from specflow.bench.statistics.verdict import LEAST_LENGTH
from specflow.config import SglangSpeculation, Speculation
from specflow.results.schema import Conditions, StepCosts
from specflow.tune.candidates import Candidate, Prediction


@dataclass(frozen=True)
class Measured:
    """One candidate against the target alone, on the same questions."""

    candidate: Candidate
    num_questions: int
    num_requests: int
    num_tokens: int
    acceptance_length: float
    tok_s: float
    baseline_tok_s: float
    decode_tok_s: float
    """Without the prompt's forward, as predictions are."""
    baseline_decode_tok_s: float
    speedup: float
    """Ratio of tokens per second of whole requests."""
    step_ms: float
    outside_share: float | None
    """Share of the decode time outside model calls (`metrics.cost`)."""
    speedup_ci: tuple[float, float] | None = None
    lossless_rate: float | None = None
    """Greedy answers that are the target's own; None where answers are drawn, or it was not looked at."""
    conclusion: str | None = None
    """pays, does not pay, no conclusion; None in the search, which concludes nothing."""
    verdict: str | None = None

    @property
    def decode_speedup(self) -> float:
        """Without the prompt's forward."""
        return self.decode_tok_s / self.baseline_decode_tok_s if self.baseline_decode_tok_s else 0.0

    @property
    def pays(self) -> bool:
        return self.conclusion == "pays"

    @property
    def loses(self) -> bool:
        """Whether it is shown to be slower. A draft that is never right counts, though a benchmark would look for the
        mistake before it concluded anything.
        """
        slower = self.speedup_ci is not None and self.speedup_ci[1] < 1.0
        return self.conclusion == "does not pay" or (slower and self.acceptance_length < LEAST_LENGTH)

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "candidate"}
        return {**self.candidate.to_json(), **values, "decode_speedup": self.decode_speedup}


@dataclass
class Found:
    """Everything that the search saw."""

    costs: dict[str, StepCosts] = field(default_factory=dict)
    """By size of the draft's vocabulary as text; the whole one comes first."""
    predictions: list[Prediction] = field(default_factory=list)
    """Of every candidate, cut heads among them; fastest first."""
    searched: list[Measured] = field(default_factory=list)
    confirmed: list[Measured] = field(default_factory=list)
    gain_of_cut: tuple[float, tuple[float, float] | None] | None = None
    """Speed of the best cut head over the best whole one, and its interval, on the fresh prompts."""
    prompts: dict[str, list[str]] = field(default_factory=dict)
    spent_s: dict[str, float] = field(default_factory=dict)

    def best(self, kind: str) -> Measured | None:
        """The `chain`, `tree` or `cut` that was measured on fresh prompts."""
        return next((m for m in self.confirmed if kind_of(m.candidate) == kind), None)

    @property
    def winner(self) -> Measured | None:
        """The faster of chain and tree, with the whole vocabulary, on the fresh prompts; of one that pays and one that
        may not, the one that pays.
        """
        found = [m for kind in ("chain", "tree") if (m := self.best(kind)) is not None]
        return max(found, key=lambda m: (m.pays, m.speedup), default=None)


def kind_of(candidate: Candidate) -> str:
    if candidate.draft_vocab_size is not None:
        return "cut"
    return "chain" if candidate.is_chain else "tree"


def judged(records: Sequence[Record], candidate: Candidate, *, greedy: bool, conditions: Conditions) -> Measured:
    """`summarise`, with an interval and the benchmark's verdict; `conditions` as that takes them."""
    own = [
        record if record.engine == BASELINE else replace(record, engine=DRAFT)
        for record in records
        if record.engine in (BASELINE, candidate.name)
    ]
    summary = summary_of(
        own,
        num_speculative_tokens=candidate.depth,
        greedy=greedy,
        tree=not candidate.is_chain,
        conditions=conditions,
    )
    overall = summary.overall
    return replace(
        summarise(records, candidate),
        speedup_ci=overall.speedup_ci,
        lossless_rate=overall.lossless_rate,
        conclusion=summary.conclusion.conclusion,
        verdict=summary.verdict,
    )


def summarise(records: Sequence[Record], candidate: Candidate) -> Measured:
    """One candidate's numbers over all its records."""
    own = [record for record in records if record.engine == candidate.name]
    pairs = paired([record for record in records if record.engine == BASELINE], own)
    plain = [base for base, _ in pairs]
    assert pairs, f"{candidate.name} was not measured"
    speedup = metrics.speedup(pairs)
    assert speedup is not None
    steps = sum(len(record.steps) for record in own)
    costs = metrics.cost(plain, own, None)
    return Measured(
        candidate=candidate,
        num_questions=len({record.question for record in own}),
        num_requests=len(own),
        num_tokens=sum(len(record.token_ids) for record in own),
        acceptance_length=metrics.acceptance(own, candidate.depth).length,
        tok_s=metrics.tok_s(own),
        baseline_tok_s=metrics.tok_s(plain),
        decode_tok_s=metrics.decode_tok_s(own),
        baseline_decode_tok_s=metrics.decode_tok_s(plain),
        speedup=speedup,
        step_ms=1e3 * sum(record.decode_s for record in own) / steps if steps else 0.0,
        outside_share=costs.outside_share,
    )


def recommend(found: Found) -> Speculation | None:
    """Serving settings that are shown to pay; K = 0 where drafting is shown to lose; None where nothing is shown."""
    chain, tree = found.best("chain"), found.best("tree")
    paying = [m for m in (chain, tree) if m is not None and m.pays]
    if not paying:
        losing = all(m.loses for m in (chain, tree) if m is not None)
        return Speculation(num_speculative_tokens=0) if losing else None
    assert found.winner is not None
    best = found.winner.candidate
    return Speculation(
        num_speculative_tokens=chain.candidate.depth if chain is not None and chain.pays else 0,
        sglang=SglangSpeculation(num_steps=best.depth, eagle_topk=best.top_k, num_draft_tokens=best.total_token),
    )
