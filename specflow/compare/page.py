"""The page of `specflow compare`: one HTML file with its figures inside, in the report's style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from specflow.compare.command import HEADER, Entry, differing_params, measured_under, row, unlike
from specflow.files import write_text
from specflow.pages import charts
from specflow.pages.page import environment, figure

INTERVALS = {
    "bench/speedup": ("speedup over the target alone", "Speedup and its interval"),
    "accept/length": ("acceptance length", "Acceptance length"),
}
"""Figures of one number an entry with its interval: axis label and title."""
BARS = {
    "vocab/coverage": ("", ".1%", "Draft vocabulary coverage of held-out answers"),
    "train/tokens": ("tokens trained", ",.0f", "Tokens trained"),
    "cost/gpu_seconds": ("GPU-seconds", ",.0f", "GPU-seconds of all stages"),
    "cost/seconds": ("seconds", ",.0f", "Seconds of all stages"),
}
"""Figures of one number an entry: axis label, d3 number format, title."""


def write_page(entries: Sequence[Entry], path: Path) -> None:
    """Write the comparison to `path`, whole or not at all."""
    text = (
        environment()
        .get_template("compare/page.html.j2")
        .render(
            entries=entries,
            header=HEADER,
            rows=[row(entry) for entry in entries],
            notes=unlike(entries),
            differing=differing_params(entries),
            conditions=measured_under(entries),
            figures=draw(entries),
        )
    )
    write_text(path, text)


def draw(entries: Sequence[Entry]) -> list[Markup]:
    """Figures, only of what was measured."""
    drawn = []
    for key, (label, title) in INTERVALS.items():
        rows = [
            {
                "name": entry.label,
                "engine": label,
                "value": entry.metrics[key],
                "low": entry.metrics.get(f"{key}_low"),
                "high": entry.metrics.get(f"{key}_high"),
            }
            for entry in entries
            if key in entry.metrics
        ]
        if rows:
            reference = 1.0 if key == "bench/speedup" else None
            drawn.append(figure(charts.intervals(rows, label, reference=reference), title))
    if survival := {entry.label: entry.survival for entry in entries if entry.survival}:
        drawn.append(figure(charts.survival(survival), "Survival by position"))
    for key, (label, form, title) in BARS.items():
        if values := _values(entries, key):
            domain = (0.0, 1.14) if form.endswith("%") else None
            drawn.append(figure(charts.bars(values, label, form, domain=domain), title))
    return drawn


def _values(entries: Sequence[Entry], key: str) -> dict[str, float]:
    return {entry.label: entry.metrics[key] for entry in entries if key in entry.metrics}
