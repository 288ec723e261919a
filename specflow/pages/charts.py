"""Charts of benchmarks, as Altair makes them; page.py turns them into snippets. Numbers come in, none is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from specflow.pages.page import AXIS, SERIES

MAX_POINTS = 120
"""Of a line: more than a column of a page can show."""
NUMBER = ",.10~g"
"""Thousands apart, no exponent, no trailing zeros."""
ALONE, DRAFT, PLAIN, TRAINED = "target alone", "with the draft", "plain step", "training's eval"
"""Series that look the same in every figure."""
SIDES = {DRAFT: SERIES[0], ALONE: SERIES[7], PLAIN: SERIES[7]}
Chart = alt.Chart | alt.LayerChart
Row = Mapping[str, Any]


def intervals(rows: Sequence[Row], label: str, *, series: str = "engine", reference: float | None = 1.0) -> Chart:
    """Points with their intervals by name. Rows: name, value, low, high (or null) and `series`."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = list(dict.fromkeys(row[series] for row in rows))
    base = _chart([{**row, "interval": _interval(row)} for row in rows])
    y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(grid=True, domain=False))
    offset = {"yOffset": alt.YOffset(f"{series}:N", sort=kinds)} if len(kinds) > 1 else {}
    color, opacity, params = _toggled(series, kinds)
    x = alt.X("value:Q", title=label, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6))
    tooltip = [
        alt.Tooltip("name:N", title=" "),
        alt.Tooltip(f"{series}:N", title="of"),
        alt.Tooltip("value:Q", title=label.split(" over ")[0], format=".3f"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
    spans = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5).encode(
        x=alt.X("low:Q", title=label), x2="high:Q", y=y, color=color, opacity=opacity, tooltip=tooltip, **offset
    )  # fmt: skip
    points = base.mark_point(size=70).encode(x=x, y=y, color=color, opacity=opacity, tooltip=tooltip, **offset)
    layers = [spans.add_params(*params), points]
    if reference is not None:
        layers.insert(0, _rule(x=reference))
    return alt.layer(*layers).properties(width="container", height=len(names) * (12 + 12 * len(kinds)))


def bars(
    values: Mapping[str, float],
    label: str,
    form: str,
    *,
    domain: tuple[float, float] | None = None,
    of_note: str | None = None,
) -> Chart:
    """One bar a row from zero, its value beside it by d3 format `form`; all but the row `of_note` are grey."""
    rows = [{"name": name, "value": value} for name, value in values.items()]
    top = max([*values.values(), 0.0]) or 1.0
    x = alt.X(
        "value:Q",
        title=label or None,
        scale=alt.Scale(domain=domain or (0, 1.2 * top), nice=False),
        axis=alt.Axis(format=form.replace(".1%", ".0%"), tickCount=5, grid=True),
    )
    base = _chart(rows).encode(x=x, y=alt.Y("name:N", sort=list(values), title=None))
    tooltip = [alt.Tooltip("name:N", title=" "), alt.Tooltip("value:Q", title=label or "value", format=form)]
    drawn = base.mark_bar(height=alt.RelativeBandSize(0.62)).encode(tooltip=tooltip)
    if of_note is not None:
        own = alt.FieldEqualPredicate(field="name", equal=of_note)
        drawn = drawn.encode(color=alt.when(own).then(alt.value(SIDES[DRAFT])).otherwise(alt.value(SIDES[ALONE])))
    numbers = base.mark_text(align="left", dx=4).encode(text=alt.Text("value:Q", format=form))
    return alt.layer(drawn, numbers).properties(width="container", height=24 * len(rows))


def by_category(rows: Sequence[Row], label: str = "acceptance length") -> Chart:
    """A length by category, from 1 (nothing accepted) on. Rows: name, series, value, speedup, tokens."""
    kinds = list(dict.fromkeys(row["series"] for row in rows))
    names = [row["name"] for row in rows]
    # Two sets may share a category: then the set's name tells the rows apart.
    rows = [
        {**row, "start": 1, "row": f"{row['name']} ({row['series']})" if names.count(row["name"]) > 1 else row["name"]}
        for row in rows
    ]
    color, opacity, params = _toggled("series", kinds)
    tooltip = [
        alt.Tooltip("series:N", title=" "),
        alt.Tooltip("name:N", title="category"),
        alt.Tooltip("value:Q", title=label, format=".3f"),
        alt.Tooltip("speedup:Q", title="speedup", format=".2f"),
        alt.Tooltip("tokens:Q", title="tokens", format=",d"),
    ]
    y = alt.Y("row:N", sort=[row["row"] for row in rows], title=None, axis=alt.Axis(grid=True, domain=False))
    x = alt.X("value:Q", title=label, scale=alt.Scale(domainMin=1, nice=True), axis=alt.Axis(grid=True, tickCount=5))
    base = _chart(rows).encode(y=y, color=color, opacity=opacity, tooltip=tooltip)
    stems = base.mark_rule(strokeWidth=2).encode(x=alt.X("start:Q", title=label), x2="value:Q")
    points = base.mark_point(size=70).encode(x=x)
    return alt.layer(stems.add_params(*params), points).properties(width="container", height=22 * len(rows))


def lines(
    rows: Sequence[Row],
    x: str,
    y: str,
    *,
    log2: bool = False,
    whole: bool = False,
    from_zero: bool = False,
    percent: bool = False,
    reference: float | None = None,
    form: str = ",.3~f",
    points: bool = True,
    tooltip: Sequence[tuple[str, str, str]] = (),
    dashed: Sequence[str] = (TRAINED,),
    legend_columns: int = 3,
    height: int = 230,
) -> Chart:
    """Lines by `series` over x. Rows: series, x, y and what `tooltip` names (field, title, format).

    `log2`: x by doublings, ticks where something was measured; `whole`: x counts; `reference`: a dashed line across;
    `dashed`: series drawn so.
    """
    kinds = list(dict.fromkeys(row["series"] for row in rows))
    color, opacity, params = _toggled("series", kinds, legend_columns)
    measured = sorted({row["x"] for row in rows})
    axis = alt.Axis(format=NUMBER, tickCount=6)
    if (whole or log2) and len(measured) <= 12:
        axis = alt.Axis(values=measured, format="d")
    kind = {"type": "log", "base": 2} if log2 else {"zero": False}
    scale = alt.Scale(nice=False, padding=14, **kind) if whole or log2 else alt.Scale(nice=True, **kind)
    y_scale = alt.Scale(domain=(0, 1)) if percent else alt.Scale(zero=from_zero, nice=True)
    y_axis = alt.Axis(format=".0%", tickCount=5) if percent else alt.Axis(tickCount=5)
    told = [alt.Tooltip("series:N", title=" ")] if len(kinds) > 1 else []
    told += [alt.Tooltip("x:Q", title=x, format=NUMBER), alt.Tooltip("y:Q", title=y, format=".1%" if percent else form)]
    told += [alt.Tooltip(f"{field}:Q", title=title, format=text) for field, title, text in tooltip]
    base = _chart(rows).encode(
        x=alt.X("x:Q", title=x, scale=scale, axis=axis),
        y=alt.Y("y:Q", title=y, scale=y_scale, axis=y_axis),
        color=color,
        opacity=opacity,
        tooltip=told,
    )
    drawn = base.mark_line().encode(order="x:Q")
    if broken := [name for name in kinds if name in dashed]:
        chosen = alt.FieldOneOfPredicate(field="series", oneOf=broken)
        drawn = drawn.encode(strokeDash=alt.when(chosen).then(alt.value([5, 4])).otherwise(alt.value([1, 0])))
    layers = [drawn.add_params(*params), base.mark_point(size=55 if points else 8)]
    if reference is not None:
        layers.insert(0, _rule(y=reference))
    return alt.layer(*layers).properties(width="container", height=height)


def survival(curves: Mapping[str, Sequence[float]]) -> Chart:
    """Share of steps in which the first i drafted tokens are all kept, by prompt set."""
    rows = [
        {"series": name, "x": i, "y": rate} for name, curve in curves.items() for i, rate in enumerate(curve, start=1)
    ]
    return lines(rows, "position i of the draft", "first i kept", whole=True, percent=True)


def sweep(points: Sequence[Row], chosen: int) -> Chart:
    """Speedup by number of drafted tokens; a ring marks the one taken."""
    rows = [
        {**point, "series": "speedup", "x": point["num_speculative_tokens"], "y": point["speedup"]} for point in points
    ]
    told = [("acceptance_length", "acceptance length", ".2f"), ("tok_s", "tok/s", ".1f")]
    drawn = lines(rows, "drafted tokens K", "speedup", whole=True, reference=1.0, tooltip=told)
    ring = _chart([row for row in rows if row["x"] == chosen]).mark_point(
        size=220, filled=False, strokeWidth=2, color=SERIES[1]
    )
    return alt.layer(drawn, ring.encode(x="x:Q", y="y:Q"))


def tuned(predicted: Sequence[Row], measured: Sequence[Row]) -> Chart:
    """Decode speedup by drafting steps: lines as predicted, rings as measured. Rows: series, x, y, tokens, length."""
    told = [("tokens", "draft tokens, root included", "d"), ("length", "acceptance length", ".2f")]
    drawn = lines(
        predicted, "steps (drafted tokens on a path)", "speedup while decoding", whole=True, reference=1.0, tooltip=told
    )
    color = _color("series", list(dict.fromkeys(row["series"] for row in predicted)))
    rings = _chart(measured).mark_point(size=190, filled=False, strokeWidth=2.5).encode(
        x="x:Q",
        y="y:Q",
        color=color,
        tooltip=[
            alt.Tooltip("series:N", title="measured"),
            alt.Tooltip("x:Q", title="steps"),
            alt.Tooltip("y:Q", title="speedup", format=".2f"),
            *(alt.Tooltip(f"{field}:Q", title=title, format=form) for field, title, form in told),
        ],
    )  # fmt: skip
    return alt.layer(drawn, rings)


def histogram(counts: Mapping[int, int]) -> Chart:
    """Share of steps by acceptance length; lengths that never occurred have an empty place."""
    total = sum(counts.values()) or 1
    rows = [
        {"x": length, "y": counts.get(length, 0) / total, "steps": counts.get(length, 0)}
        for length in range(1, max(counts, default=1) + 1)
    ]
    tooltip = [
        alt.Tooltip("x:O", title="acceptance length"),
        alt.Tooltip("y:Q", title="share of steps", format=".1%"),
        alt.Tooltip("steps:Q", title="steps", format=",d"),
    ]
    base = _chart(rows).encode(
        x=alt.X("x:O", title="tokens emitted by a step", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:Q", title="share of steps", axis=alt.Axis(format=".0%", tickCount=5)),
        tooltip=tooltip,
    )
    return alt.layer(
        base.mark_bar(width=alt.RelativeBandSize(0.62)),
        base.mark_text(dy=-7).encode(text=alt.Text("y:Q", format=".0%")),
    ).properties(width="container", height=230)


def stacked(rows: Sequence[Row], label: str) -> Chart:
    """Parts of a whole by name, as one bar each. Rows: name, part, value."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    rows = [{**row, "order": parts.index(row["part"])} for row in rows]
    return (
        _chart(rows)
        .mark_bar(height=alt.RelativeBandSize(0.6))
        .encode(
            x=alt.X("value:Q", title=label, axis=alt.Axis(grid=True, tickCount=5)),
            y=alt.Y("name:N", sort=names, title=None),
            color=_color("part", parts, columns=2),
            order="order:Q",
            tooltip=[
                alt.Tooltip("name:N", title=" "),
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("value:Q", title="ms", format=".2f"),
            ],
        )
        .properties(width="container", height=34 * len(names))
    )


def users(rows: Sequence[Row]) -> Chart:
    """What one request gets against what the server gives in all. Rows: series, x, y, at (requests in flight)."""
    kinds = list(dict.fromkeys(row["series"] for row in rows))
    color, opacity, params = _toggled("series", kinds)
    base = _chart(rows).encode(
        x=alt.X("x:Q", title="tok/s per user", scale=alt.Scale(zero=True)),
        y=alt.Y("y:Q", title="output tok/s of the server", scale=alt.Scale(zero=True)),
        color=color,
        opacity=opacity,
        tooltip=[
            alt.Tooltip("series:N", title=" "),
            alt.Tooltip("at:Q", title="requests at once", format="d"),
            alt.Tooltip("x:Q", title="tok/s per user", format=".1f"),
            alt.Tooltip("y:Q", title="tok/s in all", format=".1f"),
        ],
    )
    return alt.layer(
        base.mark_line().encode(order="at:Q").add_params(*params),
        base.mark_point(size=60),
        base.mark_text(align="left", dx=7, dy=-6).encode(text="at:Q"),
    ).properties(width="container", height=230)


def training(points: Sequence[Row]) -> Chart:
    """Loss of each step of training-time test, averaged in buckets where there are many optimizer steps."""
    keys = sorted({key for point in points for key in point if re.fullmatch(r"loss_\d+", key)})
    rows = [
        {"series": f"TTT step {key.removeprefix('loss_')}", "x": x, "y": y}
        for key in keys
        for x, y in buckets([(point["step"], point[key]) for point in points if key in point])
    ]
    return lines(rows, "optimizer step", "loss", points=False)


def evals(points: Sequence[Row]) -> Chart:
    """Expected acceptance length on held-out answers over training."""
    rows = [{"series": "expected", "x": p["step"], "y": p["expected_acceptance_length"]} for p in points]
    return lines(rows, "optimizer step", "expected acceptance length")


def buckets(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS means over equal runs of points, each at its run's last x."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], round(sum(y for _, y in group) / len(group), 4)) for group in groups]


def _chart(rows: Sequence[Row]) -> alt.Chart:
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))


def _interval(row: Row) -> str:
    return "none" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"


def _rule(**at: float) -> alt.Chart:
    """A dashed line across, at x or y."""
    channels = {"x": alt.XDatum, "y": alt.YDatum}
    encoded = {axis: channels[axis](value) for axis, value in at.items()}
    return alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[5, 4], color=AXIS, strokeWidth=1.2).encode(**encoded)


def _color(field: str, kinds: Sequence[str], columns: int = 3) -> alt.Color:
    legend = alt.Legend(columns=columns) if len(kinds) > 1 else None
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(kinds), range=_range(kinds)), legend=legend)


def _range(kinds: Sequence[str]) -> list[str]:
    """A colour for each series; the two sides of a benchmark have theirs everywhere."""
    colors = {name: SIDES[side] for name in kinds for side in SIDES if name.startswith(side)}
    rest = [color for color in SERIES if color not in colors.values()]
    others = [name for name in kinds if name not in colors]
    return [colors.get(name) or rest[others.index(name) % len(rest)] for name in kinds]


def _toggled(field: str, kinds: Sequence[str], columns: int = 3) -> tuple[alt.Color, Any, list[alt.Parameter]]:
    """Colour, opacity and the legend that turns series on and off, where there are several."""
    if len(kinds) < 2:
        return _color(field, kinds), alt.value(1.0), []
    chosen = alt.selection_point(fields=[field], bind="legend")
    return _color(field, kinds, columns), alt.when(chosen).then(alt.value(1.0)).otherwise(alt.value(0.08)), [chosen]
