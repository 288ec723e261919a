"""A benchmark's summary as lines for a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specflow.config_bench import DynamicTree, Mode, StaticTree
from specflow.results.schema import Accuracy, BatchRow, Interval, Summary

MEANING = {
    "lookup": "prompt lookup: n-grams of the text so far",
    "assistant": "an independent small model",
    "oracle": "always right: no draft of this length is faster",
    "null": "always wrong: what drafting in vain costs",
}
"""Of each reference row."""


def table(summary: Summary) -> list[str]:
    """Verdict, what was run, sets, reference rows, costs, batches and accuracy, each where it was measured."""
    mode = summary.settings.mode
    parts = [
        [_verdict(summary, mode)],
        [*_what(summary), *summary.notes],
        _sets(summary),
        _references(summary),
        _costs(summary),
        _batches(summary.batch),
        _accuracy(summary.accuracy or {}),
    ]
    filled = [part for part in parts if part]
    return [line for number, part in enumerate(filled) for line in ([""] if number else []) + part]


def _verdict(summary: Summary, mode: Mode) -> str:
    overall = summary.overall
    if mode == "baseline":
        return f"Target alone: {overall.baseline_tok_s:.1f} tok/s; nothing to compare with (--mode baseline)."
    if mode == "draft":
        return (
            f"With the draft: {overall.tok_s:.1f} tok/s at acceptance length {overall.acceptance_length:.2f}; "
            "no speedup is claimed without the target alone (--mode draft)."
        )
    return str(summary.verdict)


def _what(summary: Summary) -> list[str]:
    settings, about = summary.settings, summary.identity
    tree, k = summary.tree, summary.num_speculative_tokens
    drafting = f"a chain of {k}" if tree is None else _tree(tree)
    if settings.mode == "baseline":
        drafting = "no draft"
    sampling = "greedy"
    if settings.temperature > 0:
        sampling = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k}"
    times = f"{settings.num_samples} answers, " if settings.num_samples > 1 else ""
    return [
        f"{summary.family}: {about.target.source}, {about.target.dtype}, on "
        f"{about.cpu if about.device == 'cpu' else about.device}",
        f"{drafting}, {sampling}, {times}{settings.max_new_tokens} new tokens a turn, {settings.repeats} repeats",
    ]


def _tree(tree: DynamicTree | StaticTree) -> str:
    if isinstance(tree, StaticTree):
        return f"a static tree of {tree.total_token} tokens"
    return f"a tree of {tree.total_token} tokens, depth {tree.depth}, top-k {tree.top_k}"


def _sets(summary: Summary) -> list[str]:
    rows = [(name, found) for name, found in summary.sets.items()]
    if len(rows) > 1:
        rows.append(("all", summary.overall))
    header = ("prompt set", "questions", "accept", "tok/s", "alone", "speedup", "95 % interval", "lossless")
    body = [
        (
            name,
            str(found.num_questions),
            _number(found.acceptance_length, 2),
            _number(found.tok_s, 1),
            _number(found.baseline_tok_s, 1),
            _number(found.speedup, 2, "x"),
            _interval(found.speedup_ci, 2),
            _share(found.lossless_rate),
        )
        for name, found in rows
    ]
    legend = "accept: tokens per verification step, the target's own included; alone: the target without a draft"
    return [*_columns([header, *body]), legend]


def _references(summary: Summary) -> list[str]:
    rows = [
        (name, _number(row.acceptance_length, 2), _number(row.tok_s, 1), _number(row.speedup, 2, "x"),
         MEANING.get(name, ""))
        for name, row in summary.overall.references.items()
    ]  # fmt: skip
    if summary.stock_generate_tok_s is not None:
        over = summary.baseline_over_stock
        text = "" if over is None else f"transformers' own; our target alone is {over:.2f}x as fast"
        rows.append(("generate()", "", _number(summary.stock_generate_tok_s, 1), "", text))
    return _columns([("reference", "accept", "tok/s", "speedup", ""), *rows]) if rows else []


def _costs(summary: Summary) -> list[str]:
    costs, model = summary.cost, summary.cost_model
    if costs.t_draft_ms is None or costs.t_target_ms is None:
        return []
    share = costs.outside_share
    lines = [
        f"a step takes {costs.t_target_ms:.1f} ms without a draft; {costs.t_draft_ms:.1f} ms to draft and "
        f"{costs.t_verify_ms:.1f} ms to verify with it; time outside model calls: "
        + ("not measured" if share is None else f"{share:.1%}")
    ]
    if model is not None:
        verify = ", ".join(f"{n}: {ms:.1f}" for n, ms in model.verify_ms.items())
        lines.append(f"ms to verify n tokens, measured alone behind {model.context} others: {verify}")
    return lines


def _batches(rows: Sequence[BatchRow]) -> list[str]:
    body = [
        (str(row.batch_size), _number(row.acceptance_length, 2), _number(row.tok_s, 1),
         _number(row.baseline_tok_s, 1), _number(row.speedup, 2, "x"), _share(row.lossless_rate))
        for row in rows
    ]  # fmt: skip
    return _columns([("at once", "accept", "tok/s", "alone", "speedup", "lossless"), *body]) if body else []


def _accuracy(found: Mapping[str, Accuracy]) -> list[str]:
    body = [
        (name, row.kind, str(row.num_answers), _share(row.baseline), _share(row.draft),
         _number(row.difference, 3))
        for name, row in found.items()
    ]  # fmt: skip
    return _columns([("answers right", "by", "answers", "alone", "draft", "difference"), *body]) if body else []


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells in columns: the first and a last one of text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = {0, len(widths) - 1} if rows[0][-1] == "" else {0}
    return [
        "  ".join(
            cell.ljust(width) if column in text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _interval(interval: Interval | None, digits: int) -> str:
    return "-" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
