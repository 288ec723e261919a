"""Figures of the report: what of a family's numbers goes into which chart. Only what was measured is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup

from specflow.pages import charts
from specflow.pages.page import figure
from specflow.report.content import FamilyPage, Latency
from specflow.results.schema import Interval, SetResult, StepCosts, Summary
from specflow.results.served import Side, SideResult

SIDES: dict[Side, str] = {"draft": charts.DRAFT, "baseline": charts.ALONE}
LATENCY_POINTS = 100


def family(found: FamilyPage) -> dict[str, Markup]:
    """Snippets by name for one family's page."""
    return {**dict(_acceptance(found)), **dict(_speed(found)), **dict(_served(found)), **dict(_training(found))}


def _acceptance(found: FamilyPage) -> Iterator[tuple[str, Markup]]:
    sets, overall = found.summary.sets, found.overall
    if rows := _by_category(sets):
        yield (
            "category",
            figure(
                charts.by_category(rows),
                "Acceptance length by category",
                "Tokens emitted per verification step, from 1 (no draft accepted) on.",
            ),
        )
    curves = {name: result.survival for name, result in sets.items() if result.survival}
    if found.eval_survival:
        curves[charts.TRAINED] = found.eval_survival
    if curves:
        caption = "Share of steps in which the first i drafted tokens were all accepted."
        if found.eval_survival:
            caption += " Dashed: training's own evaluation."
        yield "survival", figure(charts.survival(curves), "Survival by position", caption)
    if overall.histogram:
        caption = f"All prompt sets; {overall.num_steps:,} steps.".replace(",", " ")
        yield "histogram", figure(charts.histogram(overall.histogram), "Tokens per step", caption)


def _by_category(sets: Mapping[str, SetResult]) -> list[dict[str, Any]]:
    return [
        {
            "name": category,
            "series": name,
            "value": part.acceptance_length,
            "speedup": part.speedup,
            "tokens": part.num_tokens,
        }
        for name, result in sets.items()
        for category, part in result.by_category.items()
        if part.acceptance_length is not None
    ]


def _speed(found: FamilyPage) -> Iterator[tuple[str, Markup]]:
    summary, overall, cost = found.summary, found.overall, found.summary.cost_model
    if rows := _speedups(found.rows, charts.DRAFT):
        rows += [
            {"name": name, "engine": "n-gram lookup", "value": row.speedup, "low": None, "high": None}
            for name, result in found.rows.items()
            if (row := result.references.get("lookup")) is not None and row.speedup is not None
        ]
        caption = "With its 95 % interval. An interval that includes 1 (dashed) decides nothing."
        yield (
            "speedup",
            figure(charts.intervals(rows, "speedup over the target alone"), "Speedup by prompt set", caption),
        )
    if summary.sweep:
        yield (
            "sweep",
            figure(
                charts.sweep([point.to_json() for point in summary.sweep], summary.num_speculative_tokens),
                "Speedup by number of drafted tokens",
                "On held-out prompts, which are left out of the benchmark. The ring marks the K that was taken.",
            ),
        )
    if tune := found.tune:
        caption = "Lines: predicted from acceptance and measured costs. Rings: measured on other prompts than these."
        yield "tuned", figure(_tuned(tune), "Speedup by steps and branches", caption)
    bounds = {bound.label: bound.row.speedup for bound in found.references if bound.row.speedup is not None}
    if bounds and overall.speedup is not None:
        speeds = {"the draft": overall.speedup, **bounds}
        speeds = dict(sorted(speeds.items(), key=lambda item: item[1]))
        chart = charts.bars(speeds, "speedup over the target alone", ".2f", of_note="the draft")
        yield "references", figure(chart, "The draft between its bounds")
    if batch := summary.batch:
        sides = {charts.DRAFT: [row.tok_s for row in batch], charts.ALONE: [row.baseline_tok_s for row in batch]}
        rows = [
            {"series": label, "x": row.batch_size, "y": tok_s, "speedup": row.speedup}
            for label, speeds_of in sides.items()
            for row, tok_s in zip(batch, speeds_of, strict=True)
        ]
        chart = charts.lines(
            rows,
            "requests in a batch",
            "tok/s in all",
            log2=True,
            from_zero=True,
            tooltip=[("speedup", "speedup", ".2f")],
        )
        yield "batch", figure(chart, "Throughput by batch size", "In process, a chain per request.")
    if found.latency:
        yield "latency", figure(_latency(found.latency), "Time per output token", LATENCY_CAPTION)
    yield "parts", figure(_parts(summary), "Time per token", "Mean over the benchmark, while decoding.")
    if cost is not None and len(cost.verify_ms) > 1:
        yield "verify", figure(_verify(cost), "Verifying n tokens", VERIFY_CAPTION.format(cost.context))


def _tuned(tune: Mapping[str, Any]) -> charts.Chart:
    """Of predictions the fastest at each depth and number of branches; the draft's whole vocabulary alone."""

    def row(candidate: Mapping[str, Any], speedup: float) -> dict[str, Any]:
        return {
            "series": "chain" if candidate["topk"] == 1 else f"topk {candidate['topk']}",
            "x": candidate["steps"],
            "y": speedup,
            "tokens": candidate["num_draft_tokens"],
            "length": candidate["acceptance_length"],
        }

    best: dict[tuple[int, int], dict[str, Any]] = {}
    for candidate in sorted(tune["predicted"], key=lambda candidate: -candidate["decode_speedup"]):
        if candidate["draft_vocab_size"] is None:
            best.setdefault((candidate["topk"], candidate["steps"]), row(candidate, candidate["decode_speedup"]))
    measured = {
        m["name"]: row(m, m["decode_speedup"])
        for m in [*tune["searched"], *tune["confirmed"]]
        if m["draft_vocab_size"] is None
    }
    return charts.tuned([best[key] for key in sorted(best)], list(measured.values()))


LATENCY_CAPTION = "Share of the requests that are answered at this pace or faster; batch 1, in process."
VERIFY_CAPTION = "One forward over n tokens behind {} tokens of context. Dashed: a plain step of the target."


def _speedups(rows: Mapping[str, SetResult], engine: str) -> list[dict[str, Any]]:
    return _intervals({name: (found.speedup, found.speedup_ci) for name, found in rows.items()}, engine)


def _lengths(rows: Mapping[str, SetResult], engine: str) -> list[dict[str, Any]]:
    found = {name: (result.acceptance_length, result.acceptance_length_ci) for name, result in rows.items()}
    return _intervals(found, engine)


def _intervals(values: Mapping[str, tuple[float | None, Interval | None]], engine: str) -> list[dict[str, Any]]:
    rows = []
    for name, (value, interval) in values.items():
        low, high = interval or (None, None)
        if value is not None:
            rows.append({"name": name, "engine": engine, "value": value, "low": low, "high": high})
    return rows


def _latency(engines: Sequence[Latency]) -> charts.Chart:
    """Cumulative share of requests over their time per token."""
    rows = []
    for engine in sorted(engines, key=lambda engine: engine.engine == charts.ALONE):
        times = engine.tpots_ms
        step = max(1, len(times) // LATENCY_POINTS)
        kept = sorted({*range(0, len(times), step), len(times) - 1}) if times else []
        rows += [{"series": engine.engine, "x": round(times[i], 3), "y": (i + 1) / len(times)} for i in kept]
    return charts.lines(rows, "ms per token", "share of requests", percent=True, points=False)


def _parts(summary: Summary) -> charts.Chart:
    """Milliseconds per emitted token: a plain step, and a step with the draft over its acceptance length."""
    cost, length = summary.cost, summary.overall.acceptance_length or 1.0
    rows = [{"name": charts.ALONE, "part": charts.PLAIN, "value": cost.t_target_ms}]
    for name, ms in {"drafting": cost.t_draft_ms, "verifying": cost.t_verify_ms}.items():
        rows.append({"name": charts.DRAFT, "part": name, "value": (ms or 0.0) / length})
    return charts.stacked([row for row in rows if row["value"] is not None], "ms per token")


def _verify(cost: StepCosts) -> charts.Chart:
    rows = [{"series": "verify", "x": n, "y": ms} for n, ms in cost.verify_ms.items()]
    return charts.lines(rows, "tokens verified at once", "ms", log2=True, from_zero=True, reference=cost.target_ms)


def _served(found: FamilyPage) -> Iterator[tuple[str, Markup]]:
    if found.served is None:
        return
    levels = found.served.levels
    rows = [
        {"series": label, "x": level.concurrency, "y": level.of(side).tok_s}
        for side, label in SIDES.items()
        for level in levels
    ]
    chart = charts.lines(rows, "requests in flight", "output tok/s", log2=True, from_zero=True)
    yield "served_throughput", figure(chart, "Throughput by concurrency", "Output tokens per second over all requests.")
    rows = [
        {"series": label, "x": level.of(side).user_tok_s, "y": level.of(side).tok_s, "at": level.concurrency}
        for side, label in SIDES.items()
        for level in levels
        if level.of(side).user_tok_s is not None
    ]
    if rows:
        caption = (
            "What one request gets against what the server gives in all, by requests in flight. Up and right is better."
        )
        yield "served_users", figure(charts.users(rows), "Per user against in all", caption)
    rows = [
        {"series": f"{label}, {rank}", "x": level.concurrency, "y": ms}
        for side, label in SIDES.items()
        for rank in ("p50", "p99")
        for level in levels
        if (ms := _tpot(level.of(side), rank)) is not None
    ]
    if rows:
        chart = charts.lines(
            rows,
            "requests in flight",
            "TPOT, ms",
            log2=True,
            from_zero=True,
            legend_columns=2,
            dashed=[f"{label}, p99" for label in SIDES.values()],
        )
        yield (
            "served_tpot",
            figure(chart, "Time per output token by concurrency", "Median, and dashed the 99th percentile."),
        )


def _tpot(side: SideResult, rank: Literal["p50", "p99"]) -> float | None:
    return side.tpot_ms.p50 if rank == "p50" else side.tpot_ms.p99


def _training(found: FamilyPage) -> Iterator[tuple[str, Markup]]:
    if found.training:
        yield "training", figure(charts.training(found.training), "Training loss", "By step of training-time test.")
    if found.evals:
        caption = "On held-out answers; the best evaluation's weights are kept."
        yield "eval", figure(charts.evals(found.evals), "Expected acceptance length", caption)
    if found.coverage:
        chart = charts.bars(found.coverage, "", ".1%", domain=(0, 1.14))
        caption = "Share of answer tokens that the draft vocabulary holds: what it lacks can never be drafted."
        yield "coverage", figure(chart, "Draft vocabulary coverage", caption)


def overview(families: Sequence[FamilyPage]) -> dict[str, Markup]:
    """Snippets by name for the page across families: the same charts with a series per family."""
    drawn = {}
    for key, title, rows_of in (
        ("speedup", "Speedup by prompt set", _speedups),
        ("acceptance_length", "Acceptance length by prompt set", _lengths),
    ):
        if rows := [row for f in families for row in rows_of(f.rows, f.name)]:
            one = key == "speedup"
            label = "speedup over the target alone" if one else "acceptance length"
            caption = "With 95 % intervals." + (
                " Dashed: as fast as without a draft." if one else " 1: nothing accepted."
            )
            drawn[key] = figure(charts.intervals(rows, label, reference=1.0 if one else None), title, caption)
    if curves := {f.name: f.overall.survival for f in families if f.overall.survival}:
        drawn["survival"] = figure(charts.survival(curves), "Survival by position", "All prompt sets of each family.")
    rows = [
        {
            "series": f.name,
            "x": point.num_speculative_tokens,
            "y": point.speedup,
            "acceptance_length": point.acceptance_length,
        }
        for f in families
        for point in f.summary.sweep
    ]
    if rows:
        told = [("acceptance_length", "acceptance length", ".2f")]
        chart = charts.lines(rows, "drafted tokens K", "speedup", whole=True, reference=1.0, tooltip=told)
        drawn["sweep"] = figure(chart, "Speedup by number of drafted tokens", "On held-out prompts.")
    rows = [
        {"series": f.name, "x": level.concurrency, "y": level.speedup}
        for f in families
        if f.served
        for level in f.served.levels
    ]
    if rows:
        chart = charts.lines(rows, "requests in flight", "speedup", log2=True, reference=1.0)
        drawn["served"] = figure(chart, "Speedup through a server", "Output tok/s with the draft over those without.")
    spent = {f.name: f.spent["total"]["seconds"] / 60 for f in families if f.spent["total"]["seconds"]}
    if spent:
        chart = charts.bars(spent, "minutes", ",.1f")
        drawn["spent"] = figure(chart, "Time of all stages", "From fetching the target to this benchmark.")
    return drawn
