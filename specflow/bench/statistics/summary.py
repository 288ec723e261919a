"""summary.json's numbers, all of them from records.jsonl alone: whoever has the records can compute them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from specflow.bench.statistics import metrics
from specflow.bench.statistics.drift import drift, most_at_once
from specflow.bench.statistics.intervals import length_interval, speedup_interval
from specflow.bench.statistics.records import BASELINE, DRAFT, Record, by_engine, paired, read_records
from specflow.bench.statistics.verdict import verdict
from specflow.config_bench import REFERENCES
from specflow.results.schema import Conditions, EngineResult, ReferenceRow, SetResult, Statistics, read_summary

MADE_BY = "specflow bench <family>"
Name = TypeVar("Name", str, int)


def summary_of(
    records: Sequence[Record],
    *,
    num_speculative_tokens: int,
    greedy: bool,
    tree: bool = False,
    conditions: Conditions | None = None,
) -> Statistics:
    """All that records tell. `num_speculative_tokens`: K of a chain, the depth of a `tree`; `conditions`: default
    nothing known. The same records in another order give the same numbers, except where a first divergence is named.
    """
    assert len({record.key for record in records}) == len(records), "a request is there twice"
    if not tree:
        drafted = max((step[0] for r in records if r.engine == DRAFT for step in r.steps), default=0)
        assert drafted <= num_speculative_tokens, f"{drafted} drafted in a chain of {num_speculative_tokens}"

    def of(chosen: Sequence[Record]) -> SetResult:
        return summarise(chosen, num_speculative_tokens=num_speculative_tokens, greedy=greedy)

    overall = of(records)
    engines = by_engine(records)
    costs = metrics.cost(engines[BASELINE], engines[DRAFT], overall.acceptance_length)
    steadiness = drift(engines[BASELINE], engines[DRAFT], most_at_once=most_at_once(records))
    conditions = conditions or Conditions()
    found = verdict(overall, costs, num_speculative_tokens, tree=tree, drift=steadiness, conditions=conditions)
    return Statistics(
        sets={name: of([r for r in records if r.set == name]) for name in dict.fromkeys(r.set for r in records)},
        overall=overall,
        cost=costs,
        drift=steadiness,
        verdict=found.sentence,
        conclusion=found,
    )


def recompute(folder: Path) -> Statistics:
    """`summary_of` of the records in a benchmark's folder, under the settings that its summary.json names."""
    told = read_summary(folder / "summary.json", made_by=MADE_BY)
    return summary_of(
        read_records(folder / "records.jsonl", made_by=MADE_BY),
        num_speculative_tokens=told.num_speculative_tokens,
        greedy=told.settings.greedy,
        tree=told.tree is not None,
        conditions=told.conditions,
    )


def summarise(records: Sequence[Record], *, num_speculative_tokens: int, greedy: bool) -> SetResult:
    """The summary of one prompt set, or of several pooled: everything the report shows of it.

    `lossless` is None under sampling, where outputs are drawn and may differ: there a test on distributions speaks.
    What an engine that did not run would have to tell is None as well.
    """
    engines = by_engine(records)
    baseline, draft = engines[BASELINE], engines[DRAFT]
    pairs = paired(baseline, draft)
    lossless_rate, first_divergence = metrics.losslessness(pairs)
    known = greedy and bool(pairs)

    def grouped(name_of: Callable[[Record], Name]) -> dict[Name, EngineResult]:
        return {
            name: engine_summary(
                [r for r in baseline if name_of(r) == name],
                [r for r in draft if name_of(r) == name],
                num_speculative_tokens,
            )
            for name in sorted({name_of(r) for r in [*baseline, *draft]})
        }

    return SetResult(
        **dict(engine_summary(baseline, draft, num_speculative_tokens)),
        lossless=lossless_rate == 1.0 if known else None,
        lossless_rate=lossless_rate if known else None,
        first_divergence=first_divergence if known else None,
        baseline_repeats_equal=metrics.repeats_equal(baseline) if greedy and baseline else None,
        num_length_limited=len({r.request for r in baseline or draft if r.finish_reason == "length"}),
        by_category=grouped(lambda record: record.category),
        by_turn=grouped(lambda record: record.turn),
        by_sample=grouped(lambda record: record.sample),
        references={
            name: _reference(baseline, engines[name], num_speculative_tokens, greedy)
            for name in REFERENCES
            if engines[name]
        },
    )


def engine_summary(baseline: Sequence[Record], engine: Sequence[Record], num_speculative_tokens: int) -> EngineResult:
    """One engine's acceptance, and its speed over the pairs with the baseline."""
    length, interval = None, None
    accepted = metrics.acceptance(engine, num_speculative_tokens)
    if engine:
        length, interval = accepted.length, length_interval(engine)
    pairs = paired(baseline, engine)
    _check(pairs)
    plain = [b for b, _ in pairs] or baseline
    return EngineResult(
        num_requests=len({record.request for record in engine or baseline}),
        num_questions=len({record.question for record in engine or baseline}),
        num_tokens=sum(len(record.token_ids) for record in engine),
        num_steps=accepted.num_steps,
        acceptance_length=length,
        acceptance_length_ci=interval,
        acceptance_length_macro=accepted.macro_length if engine else None,
        draft_acceptance_rate=accepted.draft_acceptance_rate if engine else None,
        drafted_per_step=accepted.num_drafted / accepted.num_steps if accepted.num_steps else None,
        survival=accepted.survival,
        conditional=accepted.conditional,
        histogram=accepted.histogram,
        tok_s=metrics.tok_s(engine) if engine else None,
        baseline_tok_s=metrics.tok_s(plain) if plain else None,
        speedup=metrics.speedup(pairs),
        speedup_ci=speedup_interval(pairs),
        speedup_mean_of_ratios=metrics.speedup_mean_of_ratios(pairs),
        decode_tok_s=metrics.decode_tok_s(engine) if engine else None,
        baseline_decode_tok_s=metrics.decode_tok_s(plain) if plain else None,
        decode_speedup=metrics.decode_speedup(pairs),
    )


def _check(pairs: Sequence[tuple[Record, Record]]) -> None:
    """A pair is one prompt on both sides, and the baseline drafts nothing."""
    for base, engine in pairs:
        assert base.num_prompt_tokens == engine.num_prompt_tokens, f"{engine.key}: another prompt than the baseline's"
        assert not any(drafted for drafted, _ in base.steps), f"{base.key}: the baseline drafted"


def _reference(
    baseline: Sequence[Record], engine: Sequence[Record], num_speculative_tokens: int, greedy: bool
) -> ReferenceRow:
    """A reference row. Its steps may draft more than the draft's did (an independent model's chain of another K)."""
    most = max((drafted for record in engine for drafted, _ in record.steps), default=0)
    accepted = metrics.acceptance(engine, max(num_speculative_tokens, most))
    pairs = paired(baseline, engine)
    plain = [b for b, _ in pairs] or baseline
    return ReferenceRow(
        num_requests=len({record.request for record in engine}),
        acceptance_length=accepted.length,
        tok_s=metrics.tok_s(engine),
        baseline_tok_s=metrics.tok_s(plain) if plain else None,
        speedup=metrics.speedup(pairs),
        speedup_ci=speedup_interval(pairs),
        decode_speedup=metrics.decode_speedup(pairs),
        lossless=metrics.losslessness(pairs)[0] == 1.0 if greedy and pairs else None,
    )
