"""`specflow tune`: search, confirm, say what to serve with, and write it into params.yaml if asked to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specflow import files
from specflow.bench.identity import identity
from specflow.config import Family, Params
from specflow.gpus import leases
from specflow.gpus.resources import stage_resources
from specflow.params.file import set_params
from specflow.paths import Paths
from specflow.results.schema import Identity
from specflow.targets.model import read_facts
from specflow.tune import page
from specflow.tune.findings import Found, Measured, recommend
from specflow.tune.search import Settings, tune
from specflow.tune.workbench import ModelBench

NOTE = (
    "Measured one request at a time in specflow's own engine on this machine. A server's costs differ, above all on a "
    "GPU and with many requests at once: check the setting there with `specflow bench-served`."
)


NO_CUTS = (
    "Draft vocabulary: no cut was tried, as the draft is small, its training answers are not here, or time was short."
)


@dataclass(frozen=True)
class Options:
    budget_s: float
    max_nodes: int
    num_prompts: int
    write: bool
    output: Path | None


def run(
    name: str,
    family: Family,
    params: Params,
    paths: Paths,
    params_path: Path,
    options: Options,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tune a family and say the result; returns what tune.json holds.

    Writes tune.json, tune.html and points.jsonl to `options.output`, by default the family's state folder: they say how
    fast this machine was today, so they are no artifact of the pipeline.
    """
    folder = options.output or paths.state / "tune"
    resources = stage_resources(paths.root, "bench", family)
    with leases.lease(resources, f"tune@{name}", allow_cpu=family.allow_cpu):
        bench = ModelBench(name, family, params, paths, options.max_nodes)
        try:
            searched, fresh = bench.split(options.num_prompts)
            settings = Settings(options.budget_s, options.max_nodes)
            found = tune(bench, searched, fresh, settings)
        finally:
            bench.close()
        about = identity(read_facts(paths.target), paths.export / "eagle3", paths.root, bench.device)
    report = report_of(name, family, found, options, about)
    if options.write and report["recommended"] is not None:
        set_params(params_path, {f"families.{name}.serve.speculative": report["recommended"]})
        report["written"] = True
    files.write_json(folder / "tune.json", report)
    files.write_text(folder / "tune.html", page.render(report, found))
    files.write_jsonl(folder / "points.jsonl", points(found))
    for line in lines(report, found, options):
        say(line)
    say(f"Page: {folder / 'tune.html'}")
    return report


def report_of(name: str, family: Family, found: Found, options: Options, about: Identity) -> dict[str, Any]:
    """Everything that was found, JSON-able."""
    chosen = recommend(found)
    recommended = None if chosen is None else chosen.model_dump(exclude_none=True)
    text = None
    if recommended is not None:
        tree = {"families": {name: {"serve": {"speculative": recommended}}}}
        text = yaml.safe_dump(tree, sort_keys=False).rstrip()
    bench = family.bench
    return {
        "family": name,
        "verdict": sentence(found),
        "tone": _tone(found),
        "recommended": recommended,
        "recommended_yaml": text,
        "written": False,
        "note": NOTE,
        "draft_vocab_cut": of_cut(name, found),
        "gain_of_cut": found.gain_of_cut,
        "budget_s": options.budget_s,
        "spent_s": found.spent_s,
        "settings": {
            "max_nodes": options.max_nodes,
            "num_prompts": options.num_prompts,
            "max_new_tokens": bench.max_new_tokens,
            "temperature": bench.temperature,
            "top_p": bench.top_p,
            "top_k": bench.top_k,
            "seed": bench.seed,
        },
        "prompts": found.prompts,
        "costs": {size: costs.to_json() for size, costs in found.costs.items()},
        "confirmed": [m.to_json() for m in found.confirmed],
        "searched": [m.to_json() for m in found.searched],
        "predicted": [
            {
                **p.candidate.to_json(),
                "acceptance_length": p.acceptance_length,
                "step_ms": p.step_ms,
                "tok_s": p.tok_s,
                "decode_speedup": p.speedup,
            }
            for p in found.predictions
        ],
        "identity": about.to_json(),
    }


def sentence(found: Found) -> str:
    """The finding in one sentence, of the faster of chain and tree."""
    winner = found.winner
    assert winner is not None and winner.verdict is not None, "a chain is always confirmed"
    if winner.pays:
        return f"Pays with {described(winner)}: {_numbers(winner)}."
    if winner.loses:
        return f"Does not pay: the best setting, {described(winner)}, is {_numbers(winner)}. Serve the target alone."
    low, high = winner.speedup_ci or (0.0, 1.0)
    more = "; a larger --budget-s asks more questions" if low <= 1.0 <= high else ""
    return f"{winner.verdict} That was the best setting, {described(winner)}{more}."


def of_cut(name: str, found: Found) -> str:
    """What a smaller draft vocabulary comes to."""
    cut = found.best("cut")
    if cut is None or found.gain_of_cut is None:
        return "Draft vocabulary: no cut is predicted to be faster." if len(found.costs) > 1 else NO_CUTS
    gain, interval = found.gain_of_cut
    size = cut.candidate.draft_vocab_size
    text = (
        f"Draft vocabulary cut to {size} of {next(iter(found.costs))}: {gain:.2f}x{_within(interval)} of "
        f"the best setting's speed, acceptance length {cut.acceptance_length:.2f}"
    )
    if interval is None or interval[0] <= 1.0:
        return f"{text}: no gain is shown."
    return (
        f"{text}. To have it, set families.{name}.vocab.draft_vocab_size: {size} and `dvc repro`, which trains the "
        "draft anew."
    )


def described(measured: Measured) -> str:
    c = measured.candidate
    if c.is_chain:
        return f"a chain of {c.depth}"
    steps = "1 step" if c.depth == 1 else f"{c.depth} steps"
    return f"a tree of {steps}, topk {c.top_k}, {c.total_token} draft tokens"


def _numbers(measured: Measured) -> str:
    return (
        f"{measured.speedup:.2f}x{_within(measured.speedup_ci)} over {measured.num_questions} fresh questions, "
        f"acceptance length {measured.acceptance_length:.2f}"
    )


def _within(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95% CI {interval[0]:.2f} to {interval[1]:.2f})"


def _tone(found: Found) -> str:
    winner = found.winner
    assert winner is not None
    return "good" if winner.pays else "bad" if winner.loses else "open"


def points(found: Found) -> list[dict[str, Any]]:
    """What was measured, a row a setting in the words of SGLang's bench_speculative.py; steps 0 is the target alone."""
    measured = {m.candidate.name: m for m in [*found.searched, *found.confirmed]}.values()
    whole = [m for m in measured if m.candidate.draft_vocab_size is None]
    best = max(whole, key=lambda m: m.num_tokens)
    alone = {"batch_size": 1, "steps": 0, "topk": 0, "num_draft_tokens": 0, "acc_length": 1.0}
    return [
        {**alone, "step_time": 1.0 / best.baseline_decode_tok_s, "speed": best.baseline_decode_tok_s},
        *(
            {
                "batch_size": 1,
                "steps": m.candidate.depth,
                "topk": m.candidate.top_k,
                "num_draft_tokens": m.candidate.total_token,
                "acc_length": m.acceptance_length,
                "step_time": m.step_ms / 1e3,
                "speed": m.decode_tok_s,
                "completion_tokens": m.num_tokens / m.num_requests,
            }
            for m in whole
        ),
    ]


def lines(report: Mapping[str, Any], found: Found, options: Options) -> list[str]:
    """What the command prints."""
    text = [report["verdict"], ""]
    text += table(found)
    text.append("")
    text.append(report["draft_vocab_cut"])
    if report["recommended"] is None:
        text.append("Nothing is recommended, and nothing written.")
    else:
        words = json.dumps(report["recommended"])
        done = "Written" if report["written"] else "With --write this is written"
        text.append(f"{done} to families.{report['family']}.serve.speculative: {words}")
    return [*text, NOTE]


def table(found: Found) -> list[str]:
    header = ("setting", "steps", "topk", "tokens", "AL", "tok/s", "alone", "speedup", "95% CI", "questions")
    rows = [
        (
            m.candidate.name,
            str(m.candidate.depth),
            str(m.candidate.top_k),
            str(m.candidate.total_token),
            f"{m.acceptance_length:.2f}",
            f"{m.tok_s:.1f}",
            f"{m.baseline_tok_s:.1f}",
            f"{m.speedup:.2f}",
            "search" if m.speedup_ci is None else f"{m.speedup_ci[0]:.2f}-{m.speedup_ci[1]:.2f}",
            str(m.num_questions),
        )
        for m in [*found.confirmed, *found.searched]
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
