"""The `bench` stage: target alone against target + exported draft, in process, batch 1; records, summary and plots."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from specflow import files
from specflow.bench import measuring
from specflow.bench.job import family_job
from specflow.bench.measuring import Measured
from specflow.bench.questions import spread
from specflow.bench.served import results
from specflow.bench.served.client import Request
from specflow.bench.served.measuring import Plan, check_possible
from specflow.config import Family, Params
from specflow.errors import UserError
from specflow.paths import Log, Paths
from specflow.results.schema import Interval, SetResult, Summary
from specflow.sharding.shares import WHOLE, Share
from specflow.targets.model import read_facts


def run(name: str, family: Family, params: Params, paths: Paths, log: Log, share: Share = WHOLE) -> dict[str, float]:
    """Benchmark the exported draft of a family. Returns headline metrics; speed in tokens per second, times in ms.

    Writes bench/records.jsonl, bench/summary.json, plots/survival.json and plots/sweep.json, and with bench.serve
    bench/served.json and bench/served_records.jsonl.
    """
    serve = family.bench.serve
    if serve is not None:
        check_possible(family, name, paths, serve)
        if share != WHOLE:
            raise UserError("bench.serve measures servers one after the other: set resources.bench.shards to 1")
    with ExitStack() as stack:
        measured = measuring.measure(stack, family_job(name, family, params, paths), share)
        summary, served = measured.summary, {}
        if serve is None:
            results.forget(paths)
        else:
            requests, k = _served_requests(measured, serve.num_prompts), summary.num_speculative_tokens
            plan = Plan(name, family, paths, read_facts(paths.target), serve, requests, k)
            served = results.headline(results.run(plan, params, measured.records, paths.bench))
        write_results(measured, paths.bench)
        _write_plots(summary, paths)
        measured.state.finish()
    return headline(summary) | served


def run_first(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """What is measured once before the shares: the choice of K, stock generate(), costs."""
    measuring.measure_first(family_job(name, family, params, paths), share)
    return {}


def run_share(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """Measure the questions of one share, each on this process's device by all engines in turn."""
    measuring.measure_share(family_job(name, family, params, paths), share)
    return {}


def _served_requests(measured: Measured, num_prompts: int | None) -> list[Request]:
    """The requests of the benchmark in process, of at most `num_prompts` questions a set."""
    chosen = {name: spread(questions, num_prompts or len(questions)) for name, questions in measured.sets.items()}
    return [
        Request(
            asked.set,
            asked.question.question_id,
            asked.question.category,
            asked.turn,
            asked.prompt,
            asked.question.turns[asked.turn],
        )
        for asked in measured.runner.requests(chosen)
    ]


def write_results(measured: Measured, folder: Path) -> None:
    """records.jsonl, summary.json, and scores.jsonl where answers were judged."""
    files.write_jsonl(folder / "records.jsonl", (record.to_json() for record in measured.records))
    if measured.scored:
        files.write_jsonl(folder / "scores.jsonl", measured.scored)
    else:
        (folder / "scores.jsonl").unlink(missing_ok=True)
    files.write_json(folder / "summary.json", measured.summary.to_json())


def _write_plots(summary: Summary, paths: Paths) -> None:
    survival = [
        {"set": name, "position": position, "survival": share}
        for name, of_set in summary.sets.items()
        for position, share in enumerate(of_set.survival, 1)
    ]
    files.write_json(paths.plot("survival.json"), survival)
    overall = summary.overall
    measured = {
        "acceptance_length": overall.acceptance_length,
        "tok_s": overall.tok_s,
        "speedup": overall.speedup,
        "num_speculative_tokens": summary.num_speculative_tokens,
    }
    files.write_json(paths.plot("sweep.json"), [point.to_json() for point in summary.sweep] or [measured])


def headline(summary: Summary) -> dict[str, float]:
    """Flat metrics over all sets, and `<set>.<metric>` of each."""
    overall = summary.overall
    flat: dict[str, float | None] = {
        "acceptance_length": overall.acceptance_length,
        "acceptance_length_macro": overall.acceptance_length_macro,
        "speedup": overall.speedup,
        "decode_speedup": overall.decode_speedup,
        "tok_s": overall.tok_s,
        "baseline_tok_s": overall.baseline_tok_s,
        **_ends("speedup_ci", overall.speedup_ci),
        **_ends("acceptance_length_ci", overall.acceptance_length_ci),
        **{f"survival_{i}": share for i, share in enumerate(overall.survival, 1)},
        "num_speculative_tokens": summary.num_speculative_tokens,
        "lossless_rate": overall.lossless_rate,
        **summary.cost.to_json(),
        "stock_generate_tok_s": summary.stock_generate_tok_s,
        "baseline_over_stock": summary.baseline_over_stock,
        **{f"{engine}_speedup": row.speedup for engine, row in overall.references.items()},
        **{f"batch_{row.batch_size}_speedup": row.speedup for row in summary.batch},
    }
    for name, of_set in summary.sets.items():
        flat |= {f"{name}.{metric}": value for metric, value in _of_set(of_set).items()}
    return {name: float(value) for name, value in flat.items() if value is not None}


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _of_set(found: SetResult) -> dict[str, float | None]:
    return {
        "speedup": found.speedup,
        "acceptance_length": found.acceptance_length,
        "tok_s": found.tok_s,
        "baseline_tok_s": found.baseline_tok_s,
    }
