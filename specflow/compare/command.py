"""`specflow compare`: benchmarks of families and of runs side by side, in the terminal, as JSON or as a page.

Families are read from the files in the project; runs (`<id>`, `family@latest`, `family@all`, `family@champion`) from
the MLflow store. Both carry the same fixed metric names, so a number is the same wherever it is looked at.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specflow.config import Params, load_params
from specflow.errors import UserError
from specflow.paths import Paths, project_home
from specflow.results.schema import family_summary
from specflow.stage import configure_logging, family_paths, listed_families
from specflow.tracking import results

CONDITIONS = {
    "target_digest": "target",
    "target_dtype": "dtype",
    "machine": "machine",
    "engine": "engine",
    "bench_settings": "prompts or limits",
}
"""Tags that two speeds must share to be comparable, and what to call them."""
PARAM_SECTIONS = ("data.train_conversations", "sample.", "vocab.", "extract.", "train.", "bench.")
MAX_PARAMS = 12


@dataclass(frozen=True)
class Entry:
    """One benchmarked draft: a family's files, or a run."""

    label: str
    family: str
    method: str
    mode: str
    source: str
    """`files`, or a run id."""
    name: str
    """The run's name; empty for files."""
    metrics: dict[str, float]
    """By fixed name."""
    conditions: dict[str, str]
    params: dict[str, str]

    @property
    def survival(self) -> list[float]:
        rates: list[float] = []
        while (name := f"accept/pos_{len(rates) + 1}") in self.metrics:
            rates.append(self.metrics[name])
        return rates


def collect(params_path: Path, names: Sequence[str]) -> list[Entry]:
    """Entries for families and references; without names every listed family that has a benchmark.

    Raises UserError for an unknown name, one without a benchmark, or where there is nothing at all.
    """
    params = load_params(params_path)
    configure_logging()
    listed = listed_families(params)
    if not names:
        entries = [_of_files(name, params) for name in listed if _measured(family_paths(name, params))]
        if not entries:
            raise UserError("nothing to compare: no listed family has a benchmark, run `dvc repro` first")
        return entries
    entries = []
    for name in dict.fromkeys(names):
        if name in params.families:
            entries.append(_of_files(name, params))
        else:
            entries += _of_store(name, params)
    return list({entry.source if entry.source != "files" else entry.label: entry for entry in entries}.values())


def _measured(paths: Paths) -> bool:
    return (paths.bench / "summary.json").exists() and paths.metrics("bench").exists()


def _of_files(name: str, params: Params) -> Entry:
    from specflow.tracking.store import flatten

    paths = family_paths(name, params)
    if not _measured(paths):
        raise UserError(f"family {name!r} has no benchmark: run `dvc repro bench@{name}` first")
    mode = results.mode(name, params)
    return Entry(
        label=name,
        family=name,
        method=results.METHOD,
        mode=mode,
        source="files",
        name="",
        metrics=results.family_metrics(paths, results.measured_stages(paths, mode)),
        conditions=results.conditions(family_summary(paths)),
        params=flatten(params.families[name].model_dump(mode="json")),
    )


def _of_store(reference: str, params: Params) -> list[Entry]:
    from specflow.tracking.runs import find_runs, is_reference

    if not is_reference(reference):
        raise UserError(
            f"unknown name {reference!r}: params.yaml has {sorted(params.families)}; runs are named by their id of "
            "32 digits, or family@latest, family@all, family@champion"
        )
    runs = find_runs(project_home(Path()), reference)
    return [
        Entry(
            label=f"{run.tags.get('family', run.name)}@{run.run_id[:8]}",
            family=run.tags.get("family", "unknown"),
            method=run.tags.get("method", "unknown"),
            mode=run.tags.get("mode", "unknown"),
            source=run.run_id,
            name=run.name,
            metrics=run.metrics,
            conditions={key: run.tags.get(key, "unknown") for key in CONDITIONS},
            params=run.params,
        )
        for run in runs
    ]


HEADER = (
    "name",
    "method",
    "mode",
    "K",
    "acceptance [95 % CI]",
    "survival",
    "speedup [95 % CI]",
    "n-gram",
    "tok/s",
    "alone",
    "lossless",
    "coverage",
    "tokens trained",
    "GPU s",
    "hours",
)


def row(entry: Entry) -> list[str]:
    """An entry's cells below HEADER; `-` where it was not measured."""
    metrics = entry.metrics
    seconds = metrics.get("cost/seconds")
    return [
        entry.label,
        entry.method,
        entry.mode,
        _drafting(metrics),
        _text(metrics.get("accept/length"), "{:.2f}") + _interval(metrics, "accept/length"),
        " ".join(f"{rate:.2f}" for rate in entry.survival) or "-",
        _text(metrics.get("bench/speedup"), "{:.2f}x") + _interval(metrics, "bench/speedup"),
        _text(metrics.get("reference/lookup_speedup"), "{:.2f}x"),
        _text(metrics.get("bench/tok_s"), "{:.1f}"),
        _text(metrics.get("bench/baseline_tok_s"), "{:.1f}"),
        {1.0: "yes", 0.0: "NO", None: "sampled"}[metrics.get("bench/lossless")],
        _text(metrics.get("vocab/coverage"), "{:.1%}"),
        _text(metrics.get("train/tokens"), "{:,.0f}").replace(",", " "),
        _text(metrics.get("cost/gpu_seconds"), "{:.0f}"),
        _text(None if seconds is None else seconds / 3600, "{:.2f}"),
    ]


def _interval(metrics: dict[str, float], name: str) -> str:
    bounds = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
    return "" if None in bounds else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _drafting(metrics: dict[str, float]) -> str:
    """K of a chain; of a tree its depth and how many nodes a step drafts."""
    nodes = metrics.get("bench/drafted_per_step")
    depth = _text(metrics.get("bench/num_speculative_tokens"), "{:.0f}")
    return depth if nodes is None else f"{depth} (tree, {nodes:.0f} nodes)"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def measured_under(entries: Sequence[Entry]) -> dict[str, dict[str, list[str]]]:
    """By condition: its values, each with the entries that were measured under it."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for key, what in CONDITIONS.items():
        groups = grouped.setdefault(what, {})
        for entry in entries:
            value = entry.conditions.get(key, "unknown")
            groups.setdefault(value[:12] if key.endswith("digest") else value, []).append(entry.label)
    return grouped


def unlike(entries: Sequence[Entry]) -> list[str]:
    """One sentence for each condition that the entries do not share: their speeds do not compare across it."""
    sentences = []
    for what, groups in measured_under(entries).items():
        if len(groups) > 1:
            parts = "; ".join(f"{value}: {', '.join(labels)}" for value, labels in groups.items())
            sentences.append(f"Not the same {what}, so speeds do not compare across it ({parts}).")
    return sentences


def differing_params(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Parameters of training and measuring that differ between the entries: values by name, in the entries' order."""
    keys = dict.fromkeys(key for entry in entries for key in entry.params if key.startswith(PARAM_SECTIONS))
    values = {key: [entry.params.get(key, "-") for entry in entries] for key in keys}
    # A rebuilt run knows only the parameters that params.yaml spelled out: what it lacks is no other value.
    differing = {key: found for key, found in values.items() if len(set(found) - {"-"}) > 1}
    return dict(list(differing.items())[:MAX_PARAMS])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def compare_text(entries: Sequence[Entry]) -> str:
    """The terminal's table: one line an entry, then what must be known to read it."""
    rows = [row(entry) for entry in entries]
    kept = [column for column in range(len(HEADER)) if any(cells[column] != "-" for cells in rows)]
    blocks = [table([HEADER[c] for c in kept], [[cells[c] for c in kept] for cells in rows])]
    if differing := differing_params(entries):
        shown = [[key, *(textwrap.shorten(value, 30, placeholder="...") for value in values)]
                 for key, values in differing.items()]  # fmt: skip
        blocks.append(table(["differs", *(entry.label for entry in entries)], shown))
    return "\n\n".join([*blocks, *(["\n".join(notes)] if (notes := unlike(entries)) else [])])


def compare_json(entries: Sequence[Entry]) -> str:
    return json.dumps({"entries": [asdict(entry) for entry in entries], "notes": unlike(entries)}, indent=2)
