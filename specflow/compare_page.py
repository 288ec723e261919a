"""The page of `specflow compare`: one HTML file with its figures inside, in the report's style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from specflow.bench import figures
from specflow.compare import HEADER, Entry, differing_params, measured_under, row, unlike
from specflow.files import write_text

BARS = {
    "accept/length": ("acceptance length", "{:.2f}", "Acceptance length"),
    "train/tokens": ("tokens trained", "{:,.0f}", "Tokens trained"),
    "cost/gpu_seconds": ("GPU-seconds", "{:,.0f}", "GPU-seconds of all stages"),
    "cost/seconds": ("seconds", "{:,.0f}", "Seconds of all stages"),
}
"""Figures of one number an entry: axis label, number format, title."""


def write_page(entries: Sequence[Entry], path: Path) -> None:
    """Write the comparison to `path`, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("specflow", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("compare.html.j2").render(
        entries=entries,
        header=HEADER,
        rows=[row(entry) for entry in entries],
        notes=unlike(entries),
        differing=differing_params(entries),
        conditions=measured_under(entries),
        figures=draw(entries),
    )
    write_text(path, text)


def draw(entries: Sequence[Entry]) -> dict[str, str]:
    """SVG by title, only for what was measured."""
    speeds = {
        entry.label: {
            "speedup": entry.metrics["bench/speedup"],
            "speedup_ci": [entry.metrics["bench/speedup_low"], entry.metrics["bench/speedup_high"]],
        }
        for entry in entries
        if {"bench/speedup", "bench/speedup_low", "bench/speedup_high"} <= set(entry.metrics)
    }
    drawn = {}
    if speeds:
        drawn["Speedup and its interval"] = figures.speedup_figure(speeds, "Speedup and its interval")
    if survival := {entry.label: entry.survival for entry in entries if entry.survival}:
        drawn["Survival by position"] = figures.survival_figure(survival)
    for key, (label, form, title) in BARS.items():
        if values := _values(entries, key):
            drawn[title] = figures.bars_figure(values, label, form, title)
    if coverage := _values(entries, "vocab/coverage"):
        title = "Draft vocabulary coverage of held-out answers"
        drawn[title] = figures.coverage_figure(coverage, title)
    return drawn


def _values(entries: Sequence[Entry], key: str) -> dict[str, float]:
    return {entry.label: entry.metrics[key] for entry in entries if key in entry.metrics}
