"""What the bench stage and `specflow bench-served` make of blocks: served.json, served_records.jsonl, a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specflow import files
from specflow.bench.identity import draft_digest
from specflow.bench.served import gap
from specflow.bench.served import metrics as served_metrics
from specflow.bench.served.measuring import Plan, log_parts, measure
from specflow.bench.served.metrics import Block, ServedRecord
from specflow.bench.statistics import metrics
from specflow.bench.statistics.intervals import length_interval
from specflow.bench.statistics.records import Record
from specflow.bench.statistics.verdict import LEAST_LENGTH
from specflow.config import Params
from specflow.config_bench import HELDOUT
from specflow.paths import Paths
from specflow.results.served import BlockResult, Check, Gap, Level, Served, ServedSettings, Servers
from specflow.resume import State


def run(plan: Plan, params: Params, in_process: Sequence[Record], folder: Path) -> Served:
    """Measure, and write served.json and served_records.jsonl into `folder`.

    `in_process` are the records of the in-process benchmark; those of the same requests are compared.
    """
    parts = log_parts(plan, draft_digest(plan.paths.export / "eagle3"))
    with State(plan.paths.state / "bench_served", f"bench_served@{plan.name}", parts) as state:
        log = files.RowLog(state.folder / "blocks.jsonl", state.key)
        blocks, about, template = measure(plan, log)
        served = summarise(plan, blocks, about, _gap(plan, params, blocks, about, template, in_process))
        files.write_jsonl(folder / "served_records.jsonl", (r.to_json() for block in blocks for r in block.records))
        files.write_json(folder / "served.json", served.to_json())
        log.close()
        state.finish()
    return served


def forget(paths: Paths) -> None:
    """No results of servers beside those of a benchmark that asked none."""
    for name in ("served.json", "served_records.jsonl"):
        (paths.bench / name).unlink(missing_ok=True)


def summarise(plan: Plan, blocks: Sequence[Block], about: Servers, gap: Gap | None) -> Served:
    k, greedy = plan.num_speculative_tokens, plan.family.bench.temperature == 0.0
    levels = [
        served_metrics.level(
            [block for block in blocks if block.concurrency == concurrency],
            k,
            greedy=greedy,
            num_gpus=about.draft.num_gpus,
        )
        for concurrency in plan.serve.concurrency
    ]
    stops = served_metrics.break_even({level.concurrency: level.speedup for level in levels})
    return Served(
        engine=plan.serve.engine,
        num_speculative_tokens=k,
        settings=ServedSettings(
            **dict(plan.serve),
            max_new_tokens=plan.family.bench.max_new_tokens,
            temperature=plan.family.bench.temperature,
            num_requests=len(plan.requests),
        ),
        servers=about,
        levels=levels,
        break_even_concurrency=stops,
        counters_agree=counters_agree(blocks, k),
        blocks=[
            BlockResult(
                engine=block.engine,
                concurrency=block.concurrency,
                repeat=block.repeat,
                wall_s=block.wall_s,
                counters=block.counters,
            )
            for block in blocks
        ],
        verdict=verdict(levels, stops, engine=plan.serve.engine, version=about.draft.version, k=k),
        gap=gap,
    )


def counters_agree(blocks: Sequence[Block], num_speculative_tokens: int) -> bool | None:
    """Whether the requests' own steps add up to what the server counted; None where one of the two is not told.

    Not where a request failed: its steps are in the counters alone.
    """
    told = [
        block
        for block in blocks
        if block.engine == "draft"
        and block.counters
        and all(record.error is None and record.steps is not None for record in block.records)
    ]
    if not told:
        return None
    for block in told:
        steps = [step for record in block.records for step in record.steps or []]
        own = (len(steps), sum(drafted for drafted, _ in steps), sum(accepted for _, accepted in steps))
        assert block.counters is not None
        if own != tuple(block.counters[name] for name in ("num_steps", "num_drafted", "num_accepted")):
            return False
    return True


def verdict(levels: Sequence[Level], stops: float | None, *, engine: str, version: str | None, k: int) -> str:
    """One sentence: up to which concurrency the draft pays through this server, or no conclusion and why.

    `stops`: the break-even concurrency.
    """
    lowest, highest = levels[0], levels[-1]
    through = f"through {engine}{f' {version}' if version else ''} at K = {k}"
    at = ", ".join(
        "{:.2f}x ({:.2f} to {:.2f}) at {}".format(level.speedup, *level.speedup_range, level.concurrency)
        for level in levels
    )
    measured = f"output tokens/s (lowest to highest repeat) {at} requests at once"
    errors, asked = sum(level.num_errors for level in levels), sum(level.num_requests for level in levels)
    if errors:
        return f"No conclusion {through}: {errors} of {asked} requests failed; of the others {measured}."
    if (where := lowest.first_divergence) is not None and lowest.lossless_rate is not None:
        return (
            f"No conclusion {through}: greedy output with the draft differs in {1 - lowest.lossless_rate:.1%} of "
            f"the requests at {lowest.concurrency} at once, first in {where.set}/{where.question_id} at token "
            f"{where.position}; {measured}."
        )
    accepted = lowest.acceptance
    if accepted is not None and accepted.length < LEAST_LENGTH:
        return (
            f"No conclusion {through}: acceptance length is {accepted.length:.2f}, which means that the server read "
            f"the draft wrongly or renders another template; {measured}."
        )
    low, high = lowest.speedup_range
    if low <= 1.0 <= high:
        return f"No conclusion {through}: repeats lie on both sides of 1 at {lowest.concurrency} at once; {measured}."
    if stops is None:
        return f"Pays {through} up to {highest.concurrency} requests at once, the most measured: {measured}."
    if stops <= lowest.concurrency:
        return f"Does not pay {through}: {measured}."
    return f"Pays {through} up to about {stops:.1f} requests at once: {measured}."


def _gap(
    plan: Plan,
    params: Params,
    blocks: Sequence[Block],
    about: Servers,
    template: Check,
    in_process: Sequence[Record],
) -> Gap | None:
    """The gap on held-out prompts where there are any, else on all; None where the server tells no acceptance.

    Served: the lowest concurrency, its first time through, against the same requests in process.
    """
    lowest = plan.serve.concurrency[0]
    first = [b for b in blocks if b.concurrency == lowest and b.repeat == 0]
    heldout = any(request.set == HELDOUT for request in plan.requests)
    asked = {(r.set, r.question_id, r.turn) for r in plan.requests if r.set == HELDOUT or not heldout}
    own = [record for record in in_process if record.repeat == record.sample == 0 and record.request[:3] in asked]
    drafted = _records(first, "draft", asked)
    if not drafted or not own:
        return None
    k = plan.num_speculative_tokens
    served = metrics.acceptance(drafted, k).length
    local = metrics.acceptance([record for record in own if record.engine == "draft"], k).length
    checks = [
        gap.check_contract(plan.paths.export / "eagle3", plan.facts),
        template,
        gap.check_prompts([(r.num_prompt_tokens, r.server_prompt_tokens) for b in first for r in b.answered]),
        gap.check_dtype(about.draft.dtype, plan.facts.dtype),
        gap.check_k(_drafted(drafted) or about.draft.k, k),
        _same_outputs(_records(first, "baseline", asked), own, plan.family.bench.temperature == 0.0),
    ]
    way = "train_online" if plan.name in params.online else "train_offline"
    expected = gap.expected_length(plan.paths.metrics(way), k) if heldout else None
    return gap.gap(
        HELDOUT if heldout else "all sets",
        len(drafted),
        expected=expected,
        in_process=local,
        served=served,
        interval=length_interval(drafted),
        checks=checks,
    )


def _records(blocks: Sequence[Block], engine: str, asked: set[tuple[str, str, int]]) -> list[Record]:
    """Requests of one pass with their steps; empty where the server does not tell those."""
    chosen: dict[tuple[str, str, int], ServedRecord] = {}
    for block in blocks:
        for record in block.answered:
            if block.engine == engine and (request := (record.set, record.question_id, record.turn)) in asked:
                chosen.setdefault(request, record)
    if any(record.steps is None or record.token_ids is None for record in chosen.values()):
        return []
    return [record.as_record() for record in chosen.values()]


def _drafted(records: Sequence[Record]) -> int | None:
    """The most that any step drafted."""
    return max((drafted for record in records for drafted, _ in record.steps), default=None)


def _same_outputs(served: Sequence[Record], own: Sequence[Record], greedy: bool) -> Check:
    if not greedy:
        return gap.check_outputs(0, 0)
    local = {record.request: record.token_ids for record in own if record.engine == "baseline"}
    same = [record.token_ids == local[record.request] for record in served if record.request in local]
    return gap.check_outputs(sum(same), len(same))


def headline(served: Served) -> dict[str, float]:
    """Flat metrics for metrics/bench.json and MLflow."""
    flat: dict[str, float | None] = {}
    for level in served.levels:
        at = f"served_c{level.concurrency}"
        flat[f"{at}_speedup"] = level.speedup
        flat[f"{at}_tok_s"] = level.draft.tok_s
        flat[f"{at}_baseline_tok_s"] = level.baseline.tok_s
        flat[f"{at}_tpot_p50_ms"] = level.draft.tpot_ms.p50
        flat[f"{at}_lossless_rate"] = level.lossless_rate
    lowest = served.levels[0]
    flat["served_acceptance_length"] = lowest.acceptance and lowest.acceptance.length
    flat["served_break_even_concurrency"] = served.break_even_concurrency
    if served.gap is not None:
        flat["train_to_serve_gap"] = served.gap.gap
        flat["serve_to_in_process_gap"] = served.gap.gap_to_in_process
    return {name: float(value) for name, value in flat.items() if value is not None}


def table(served: Served) -> list[str]:
    """Lines for a terminal."""
    lines = [
        served.verdict,
        "",
        "  at once   tok/s   alone  speedup   TPOT p50/p90/p99 ms   TTFT p50/p99 ms  accept  lossless  failed",
    ]
    for level in served.levels:
        draft, accepted, rate = level.draft, level.acceptance, level.lossless_rate
        tpot = "/".join(_number(value) for value in (draft.tpot_ms.p50, draft.tpot_ms.p90, draft.tpot_ms.p99))
        ttft = "/".join(_number(value) for value in (draft.ttft_ms.p50, draft.ttft_ms.p99))
        length = "?" if accepted is None else f"{accepted.length:.2f}"
        lines.append(
            f"  {level.concurrency:7d} {draft.tok_s:7.1f} {level.baseline.tok_s:7.1f} "
            f"{level.speedup:7.2f}x {tpot:>21} {ttft:>17} {length:>7}"
            f" {'sampled' if rate is None else format(rate, '.0%'):>9} {level.num_errors:>7}"
        )
    if served.gap is not None:
        lines += ["", *gap_lines(served.gap)]
    return lines


def gap_lines(found: Gap) -> list[str]:
    interval = found.served_interval
    within = "too few questions for an interval"
    if interval is not None:
        within = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    expected = "not known" if found.expected is None else f"{found.expected:.3f}"
    return [
        f"Acceptance length on {found.set} ({found.num_requests} requests): training expected {expected}, in "
        f"process {found.in_process:.3f}, served {found.served:.3f} ({within}); "
        f"train-to-serve gap {found.gap:+.1%}.",
        *found.advice,
    ]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"
