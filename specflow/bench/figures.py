"""Figures of the report as inline SVG: transparent, sized for a phone column, text in the page's own colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = ("#3b82c4", "#dd7f1d", "#2f9e74", "#c05a97", "#8a78d0", "#9a8a3c")
"""Mid-tones that keep their contrast on white and on near-black."""
TEXT = "#010203"
"""Stands for the page's text colour; replaced by `currentColor` in the SVG."""
MAX_POINTS = 200
SERVED_SIDES = {"draft": "with the draft", "baseline": "target alone"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": "#8a8a8a",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a8a8a",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def speedup_figure(sets: dict[str, dict[str, Any]], title: str = "Speedup by prompt set") -> str:
    """Speedup with its interval by row, n-gram drafting beside it where it was measured."""
    with plt.rc_context(STYLE):
        figure, axes = _axes(height=0.62 + 0.52 * len(sets))
        for row, result in enumerate(reversed(sets.values())):
            low, high = result["speedup_ci"]
            value = result["speedup"]
            error = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
            axes.errorbar(
                value, row, xerr=error, fmt="o", color=SERIES[0], capsize=3, label="draft" if row == 0 else None
            )
            if result.get("lookup"):
                label = "n-gram lookup" if row == 0 else None
                axes.plot(result["lookup"]["speedup"], row, "D", color=SERIES[1], markersize=4, label=label)
        axes.axvline(1.0, color="#8a8a8a", linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(sets)), list(reversed(sets)))
        axes.set_ylim(-0.6, len(sets) - 0.4)
        axes.set_xlabel("speedup over the target alone (dashed: 1)")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper right", ncols=2)
        return _svg(figure, title)


def survival_figure(curves: dict[str, Sequence[float]]) -> str:
    """Share of steps in which the first i drafted tokens are all kept: prompt sets and training's own eval."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        for index, (label, survival) in enumerate(curves.items()):
            line = "--" if label.startswith("training") else "-"
            color = SERIES[index % len(SERIES)]
            axes.plot(range(1, len(survival) + 1), survival, line, marker="o", label=label, color=color)
        longest = max(len(survival) for survival in curves.values())
        axes.set_xticks(range(1, longest + 1))
        axes.set_ylim(0, 1)
        axes.set_xlabel("position i of the draft")
        axes.set_ylabel("first i kept")
        axes.legend()
        return _svg(figure, "Survival by position")


def served_throughput_figure(levels: list[dict[str, Any]]) -> str:
    """Output tokens per second by requests in flight, with the draft and without."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        xs = [level["concurrency"] for level in levels]
        for index, (side, label) in enumerate(SERVED_SIDES.items()):
            axes.plot(xs, [level[side]["tok_s"] for level in levels], marker="o", color=SERIES[index], label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests in flight")
        axes.set_ylabel("output tok/s")
        axes.legend()
        return _svg(figure, "Output tokens per second by concurrency")


def served_users_figure(levels: list[dict[str, Any]]) -> str:
    """Tokens per second of one request against those of the server; points are labelled with requests in flight."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        for index, (side, label) in enumerate(SERVED_SIDES.items()):
            told = [level for level in levels if level[side]["user_tok_s"] is not None]
            xs = [level[side]["user_tok_s"] for level in told]
            ys = [level[side]["tok_s"] for level in told]
            axes.plot(xs, ys, marker="o", color=SERIES[index], label=label)
            for level, x, y in zip(told, xs, ys, strict=True):
                axes.annotate(str(level["concurrency"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tok/s per user")
        axes.set_ylabel("output tok/s")
        axes.legend()
        return _svg(figure, "Tokens per second per user against all")


def sweep_figure(sweep: list[dict[str, float]], chosen: int) -> str:
    """Speedup by number of drafted tokens, on held-out prompts."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        xs = [point["num_speculative_tokens"] for point in sweep]
        axes.plot(xs, [point["speedup"] for point in sweep], marker="o", color=SERIES[0])
        axes.axhline(1.0, color="#8a8a8a", linewidth=1.2, linestyle="--")
        axes.margins(x=0.1, y=0.15)
        axes.set_xticks(xs, [f"{k}\nAL {point['acceptance_length']:.2f}" for k, point in zip(xs, sweep, strict=True)])
        axes.set_xlabel(f"drafted tokens K (taken: {chosen})")
        axes.set_ylabel("speedup")
        return _svg(figure, "Speedup by number of drafted tokens")


def training_figure(training: list[dict[str, float]]) -> str:
    """Loss of each TTT step, averaged in buckets where there are many optimizer steps."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        keys = sorted({key for point in training for key in point if re.fullmatch(r"loss_\d+", key)})
        for index, key in enumerate(keys):
            xs, ys = _buckets([(point["step"], point[key]) for point in training if key in point])
            axes.plot(xs, ys, color=SERIES[index % len(SERIES)], label=f"step {index}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.legend(title="TTT", title_fontsize=8)
        return _svg(figure, "Training loss by TTT step")


def eval_figure(evals: list[dict[str, float]]) -> str:
    """Expected acceptance length on held-out answers over training."""
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        xs, ys = [p["step"] for p in evals], [p["expected_acceptance_length"] for p in evals]
        axes.plot(xs, ys, marker="o", color=SERIES[2])
        best = max(range(len(ys)), key=ys.__getitem__)
        axes.annotate(f"{ys[best]:.2f}", (xs[best], ys[best]), xytext=(0, 7), textcoords="offset points", ha="center")
        axes.margins(x=0.1, y=0.22)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("expected acceptance length")
        return _svg(figure, "Expected acceptance length over training")


def coverage_figure(coverage: dict[str, float], title: str = "Draft vocabulary coverage by category") -> str:
    """Share of answer tokens that the draft vocabulary holds, by row."""
    with plt.rc_context(STYLE):
        figure, axes = _bars(coverage, "{:.1%}")
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
        return _svg(figure, title)


def bars_figure(values: dict[str, float], label: str, form: str, title: str) -> str:
    """One bar a row from zero, its value written beside it by `form`."""
    with plt.rc_context(STYLE):
        figure, axes = _bars(values, form)
        axes.set_xlim(0, 1.2 * max(values.values()) or 1.0)
        axes.set_xlabel(label)
        return _svg(figure, title)


def _bars(values: dict[str, float], form: str) -> tuple[Figure, Axes]:
    figure, axes = _axes(height=0.6 + 0.24 * len(values))
    names = list(reversed(values))
    axes.barh(names, [values[name] for name in names], color=SERIES[0], height=0.62)
    for row, name in enumerate(names):
        text = form.format(values[name])
        axes.annotate(text, (values[name], row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _axes(height: float = 2.6) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(4.4, height), layout="constrained")


def _buckets(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]


def _svg(figure: Figure, title: str) -> str:
    """The bare <svg> element: scales to its column, labelled, without ids that two figures could share."""
    stream = io.StringIO()
    with plt.rc_context({"svg.hashsalt": title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(TEXT, "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
