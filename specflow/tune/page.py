"""tune.html: the recommendation, speed against steps, and every number behind them, in one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
from markupsafe import Markup

from specflow.pages import charts, page
from specflow.results.schema import StepCosts
from specflow.tune.candidates import Prediction
from specflow.tune.findings import Found, Measured

MOST_ROWS = 24
"""Predictions in the page's table; tune.json has all."""
MEASURED_SIZE = 170


def render(report: Mapping[str, Any], found: Found) -> str:
    """The page of one tuning; `report` is what tune.json holds."""
    parts = [
        _recommended(report),
        _paragraph(report["note"]),
        _heading("Speed against steps"),
        page.figure(
            speed_chart(found),
            "Tokens per second by drafting steps",
            "Lines: predicted from acceptance and measured costs, the best number of draft tokens at each depth. "
            "Rings: measured. Dashed: the target alone. Batch 1, without the prompt's forward; each speedup times the "
            "target's own speed on the fresh prompts.",
        ),
        _heading("Confirmed on fresh prompts"),
        measured_table(found.confirmed),
        *(_paragraph(f"{m.candidate.name}: {m.verdict}") for m in found.confirmed),
        _paragraph(report["draft_vocab_cut"]),
        _heading("Measured in the search"),
        measured_table(found.searched, predictions={p.candidate.name: p for p in found.predictions}),
        _heading("Predicted"),
        predicted_table(found.predictions[:MOST_ROWS]),
        _heading("What a step costs"),
        *(cost_table(size, costs) for size, costs in found.costs.items()),
        _heading("How it was measured"),
        _paragraph(_method(report)),
    ]
    return page.document(
        f"Tuning of {report['family']}", Markup("\n").join(parts), verdict=report["verdict"], tone=report["tone"]
    )


def series_of(top_k: int) -> str:
    return "chain (topk 1)" if top_k == 1 else f"topk {top_k}"


def speed_chart(found: Found) -> alt.LayerChart:
    """Predicted lines and measured rings of the draft's whole vocabulary, by top_k.

    All are speedups of decoding times the target's own speed on the fresh prompts, so that a machine that was slower
    for a while does not set them apart.
    """
    winner = found.winner
    assert winner is not None, "something was confirmed"
    plain = winner.baseline_decode_tok_s
    best: dict[tuple[int, int], Prediction] = {}
    for prediction in found.predictions:  # fastest first
        candidate = prediction.candidate
        if candidate.draft_vocab_size is None:
            best.setdefault((candidate.top_k, candidate.depth), prediction)
    rows = [
        {
            "series": series_of(top_k),
            "x": depth,
            "y": p.speedup * plain,
            "tokens": p.candidate.total_token,
            "length": p.acceptance_length,
            "speedup": p.speedup,
        }
        for (top_k, depth), p in sorted(best.items())
    ]
    told = [
        ("tokens", "draft tokens (root included)", "d"),
        ("length", "acceptance length", ".2f"),
        ("speedup", "speedup", ".2f"),
    ]
    drawn = charts.lines(
        rows,
        "steps (most drafted tokens on a path)",
        "tokens/s",
        whole=True,
        reference=plain,
        points=False,
        tooltip=told,
    )
    rings = [
        {
            "series": series_of(m.candidate.top_k),
            "x": m.candidate.depth,
            "y": m.decode_speedup * plain,
            "tokens": m.candidate.total_token,
            "length": m.acceptance_length,
        }
        for m in {m.candidate.name: m for m in [*found.searched, *found.confirmed]}.values()
        if m.candidate.draft_vocab_size is None
    ]
    kinds = list(dict.fromkeys(row["series"] for row in rows))
    colors = alt.Scale(domain=kinds, range=[page.SERIES[i % len(page.SERIES)] for i in range(len(kinds))])
    points = (
        alt.Chart(alt.Data(values=rings))
        .mark_point(size=MEASURED_SIZE, filled=False, strokeWidth=2.5)
        .encode(
            x="x:Q",
            y="y:Q",
            color=alt.Color("series:N", scale=colors),
            tooltip=[
                alt.Tooltip("series:N", title="measured"),
                alt.Tooltip("x:Q", title="steps"),
                alt.Tooltip("y:Q", title="tokens/s", format=".1f"),
                alt.Tooltip("tokens:Q", title="draft tokens (root included)"),
                alt.Tooltip("length:Q", title="acceptance length", format=".2f"),
            ],
        )
    )
    return alt.layer(drawn, points)


def measured_table(rows: Sequence[Measured], predictions: Mapping[str, Prediction] | None = None) -> Markup:
    """What was measured; with `predictions` by name beside what had been predicted."""
    header = ["setting", "steps", "topk", "draft tokens", "AL", "tok/s", "alone tok/s", "speedup", "95 %", "lossless"]
    header += ["questions", "outside"]
    if predictions is not None:
        header[8:10] = ["AL predicted", "decode speedup", "predicted"]
    lines = []
    for m in rows:
        c = m.candidate
        line = [c.name, c.depth, c.top_k, c.total_token, page.ratio(m.acceptance_length), f"{m.tok_s:.1f}"]
        line += [f"{m.baseline_tok_s:.1f}", page.ratio(m.speedup)]
        if predictions is None:
            low, high = m.speedup_ci or (None, None)
            line += [f"{page.ratio(low)} to {page.ratio(high)}", page.percent(m.lossless_rate)]
        else:
            p = predictions[c.name]
            line += [page.ratio(p.acceptance_length), page.ratio(m.decode_speedup), page.ratio(p.speedup)]
        lines.append([*line, m.num_questions, page.percent(m.outside_share)])
    return page.table(header, lines, emphasis=7)


def predicted_table(predictions: Sequence[Prediction]) -> Markup:
    header = ["setting", "steps", "topk", "draft tokens", "AL", "step ms", "tok/s", "decode speedup"]
    rows = [
        [
            p.candidate.name,
            p.candidate.depth,
            p.candidate.top_k,
            p.candidate.total_token,
            page.ratio(p.acceptance_length),
            f"{p.step_ms:.2f}",
            f"{p.tok_s:.1f}",
            page.ratio(p.speedup),
        ]
        for p in predictions
    ]
    return page.table(header, rows, emphasis=7)


def cost_table(size: str, costs: StepCosts) -> Markup:
    """Milliseconds by rows, of one size of the draft's vocabulary."""
    draft = costs.draft_ms
    tables = {
        "verification": costs.verify_ms,
        "draft: rows of verified tokens, first token": draft.ingest_by_rows,
        "draft: each further level": draft.step_by_rows,
        "draft: a tree's own, by topk": draft.tree_by_rows,
    }
    counts = sorted({n for table in tables.values() for n in table})
    header = [f"ms, draft vocabulary {page.count(int(size))}, behind {costs.context} tokens", *map(str, counts)]
    rows = [[name, *(page.measured(table.get(n), "{:.2f}") for n in counts)] for name, table in tables.items()]
    return page.table(header, rows)


def _recommended(report: Mapping[str, Any]) -> Markup:
    settings = report["recommended_yaml"]
    if settings is None:
        return _paragraph("No setting is recommended: nothing was shown to be faster or slower than the target alone.")
    where = "Written to" if report["written"] else "What --write puts into"
    return Markup("<p>{} params.yaml:</p><pre><code>{}</code></pre>").format(where, settings)


def _method(report: Mapping[str, Any]) -> str:
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in report["spent_s"].items())
    prompts = report["prompts"]
    return (
        f"Budget {report['budget_s']:g} s; spent: {spent}. First turns of held-out conversations which the benchmark "
        f"does not ask, {report['settings']['max_new_tokens']} new tokens: {len(prompts['search'])} searched on, "
        f"{len(prompts['confirmation'])} fresh ones to confirm. Every setting answered the same questions as the "
        "target alone, in alternating order. tune.json has all candidates and the ids of the questions."
    )


def _heading(text: str) -> Markup:
    return Markup("<h2>{}</h2>").format(text)


def _paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text.replace("`", ""))
