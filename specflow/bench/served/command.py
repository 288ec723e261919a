"""`specflow bench-served`: a look at a family through its servers, beside the pipeline; no artifact changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from specflow.bench.job import family_job
from specflow.bench.questions import load_questions, prompt_tokens, spread
from specflow.bench.served import results
from specflow.bench.served.client import Request
from specflow.bench.served.measuring import Plan, check_possible
from specflow.bench.statistics.records import Record, read_records
from specflow.config import Family, Params
from specflow.config_bench import BenchServe
from specflow.errors import UserError
from specflow.gpus import leases
from specflow.gpus.resources import stage_resources
from specflow.paths import Paths
from specflow.results.schema import Summary, family_summary
from specflow.stage import configure_logging, quieten_transformers
from specflow.targets.model import TargetFacts, load_tokenizer, read_facts

SETTINGS = ("engine", "baseline_url", "draft_url", "concurrency", "num_prompts")


def look(name: str, params: Params, paths: Paths, options: Mapping[str, Any]) -> list[str]:
    """Lines of the result. Asks first turns only; K is that of the benchmark, else the export's.

    Files go to the family's state folder. The in-process side of the gap comes from bench/records.jsonl where that
    answered the same prompts with the same limit and K.
    """
    family = params.family(name)
    given = {key: value for key, value in options.items() if value not in (None, ())}
    serve = _settings(family.bench.serve or BenchServe(), given)
    limit = given.get("max_new_tokens", family.bench.max_new_tokens)
    bench = family.bench.model_copy(update={"serve": serve, "max_new_tokens": limit})
    family = family.model_copy(update={"bench": bench})
    check_possible(family, name, paths, serve)
    configure_logging()
    quieten_transformers()
    facts = read_facts(paths.target)
    summary = family_summary(paths) if (paths.bench / "summary.json").exists() else None
    k = given.get("num_speculative_tokens") or (summary and summary.num_speculative_tokens)
    plan = Plan(
        name=name,
        family=family,
        paths=paths,
        facts=facts,
        serve=serve,
        requests=_first_turns(name, family, serve, params, paths, facts),
        num_speculative_tokens=k or family.export.num_speculative_tokens,
    )
    own = _in_process(plan, summary)
    resources = stage_resources(paths.root, "bench", family)
    with leases.lease(resources, f"bench-served@{name}", allow_cpu=family.allow_cpu):
        served = results.run(plan, params, own, paths.state / "served")
    return [*results.table(served), "", f"Records: {paths.state / 'served'}"]


def _settings(serve: BenchServe, given: Mapping[str, Any]) -> BenchServe:
    chosen = {key: given[key] for key in SETTINGS if key in given}
    if "concurrency" in chosen:
        chosen["concurrency"] = sorted(set(chosen["concurrency"]))
    try:
        return BenchServe.model_validate({**serve.model_dump(), **chosen})
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _first_turns(
    name: str, family: Family, serve: BenchServe, params: Params, paths: Paths, facts: TargetFacts
) -> list[Request]:
    tokenizer = load_tokenizer(facts, paths.cache)
    sets, _ = load_questions(family_job(name, family, params, paths))
    return [
        Request(
            set_name,
            question.question_id,
            question.category,
            0,
            prompt_tokens(tokenizer, [{"role": "user", "content": question.turns[0]}]),
            question.turns[0],
        )
        for set_name, questions in sets.items()
        for question in spread(questions, serve.num_prompts or len(questions))
    ]


def _in_process(plan: Plan, summary: Summary | None) -> Sequence[Record]:
    if summary is None or summary.num_speculative_tokens != plan.num_speculative_tokens:
        return []
    asked, then = plan.family.bench, summary.settings
    if (asked.max_new_tokens, asked.temperature) != (then.max_new_tokens, then.temperature):
        return []
    return read_records(plan.paths.bench / "records.jsonl", made_by=f"dvc repro bench@{plan.name}")
