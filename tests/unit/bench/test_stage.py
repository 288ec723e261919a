"""The bench stage on a tiny target with an untrained draft: what it writes, what it refuses, what survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specflow.bench import measuring, runner, stage
from specflow.bench.job import family_job
from specflow.bench.questions import load_questions
from specflow.config import Family, Params
from specflow.config_bench import Bench
from specflow.errors import UserError
from specflow.files import write_jsonl
from specflow.paths import Paths
from specflow.results.schema import Summary, family_summary
from specflow.sharding.shares import MERGE, Share
from tests.bench_project import make_bench_project, without_times

Project = tuple[Params, Paths]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_bench_project(tmp_path_factory.mktemp("bench"))


def family_of(project: Project, **changes: Any) -> Family:
    family = project[0].families["tiny"]
    return family.model_copy(update={"bench": Bench.model_validate({**family.bench.model_dump(), **changes})})


def run(project: Project, **changes: Any) -> tuple[dict[str, float], Summary]:
    params, paths = project
    metrics = stage.run("tiny", family_of(project, **changes), params, paths, lambda values, step: None)
    return metrics, family_summary(paths)


def test_summary_and_files(project: Project) -> None:
    metrics, summary = run(project)
    paths = project[1]
    assert set(summary.sets) == {"questions", "heldout"}
    assert summary.overall.lossless is True and summary.baseline_equals_stock is True
    # 2 questions of 2 turns and 2 held-out prompts of 1, 3 repeats of 2 engines and one of lookup, oracle and null
    records = [json.loads(line) for line in (paths.bench / "records.jsonl").read_text().splitlines()]
    assert len(records) == 6 * (3 * 2 + 3)
    assert len({record["id"] for record in records}) == len(records)
    k = summary.num_speculative_tokens
    assert [point.num_speculative_tokens for point in summary.sweep] == [1, 2]
    assert summary.overall.acceptance_length == pytest.approx(1 + sum(summary.overall.survival))
    assert len(json.loads(paths.plot("survival.json").read_text())) == 2 * k
    assert metrics["speedup"] == summary.overall.speedup
    assert {"questions.speedup", "heldout.acceptance_length", "t_verify_ms", "baseline_over_stock"} <= set(metrics)
    assert summary.verdict.startswith(("No conclusion", "Does not pay"))
    assert not list(paths.state.rglob("bench.jsonl"))


def test_order_alternates_and_repeats_agree(project: Project) -> None:
    run(project, num_speculative_tokens=2, stock_generate=False)
    rows = [json.loads(line) for line in (project[1].bench / "records.jsonl").read_text().splitlines()]
    orders = [row["order"] for row in rows if row["engine"] == "baseline"]
    assert 0 < sum(order == 0 for order in orders) < len(orders)
    answers: dict[tuple[str, str, int], set[str]] = {}
    for row in rows:
        answers.setdefault((row["set"], row["question_id"], row["turn"]), set()).add(str(row["token_ids"]))
    assert all(len(different) == 1 for different in answers.values())


def test_tuning_questions_are_never_benchmarked(project: Project) -> None:
    sets, tuning = load_questions(family_job("tiny", family_of(project, num_prompts=100, sweep_prompts=100), *project))
    assert len(tuning) == 3 and len(sets["heldout"]) == 3
    assert not {q.question_id for q in tuning} & {q.question_id for q in sets["heldout"]}


def test_sampling(project: Project) -> None:
    _, summary = run(project, temperature=0.8, num_speculative_tokens=2)
    assert summary.overall.lossless is None is summary.baseline_equals_stock and summary.sweep == []


def test_killed_run_keeps_what_it_had(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_speculative_tokens": 2, "seed": 7}
    plain, calls = runner.generate, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(runner, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(project, **changes)
    kept = len(next(project[1].state.glob("bench/*/bench.jsonl")).read_text().splitlines()) - 1
    calls.clear()
    monkeypatch.setattr(runner, "generate", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    _, summary = run(project, **changes)
    warm_up, other_rows = 5, 3  # load, stock, costs
    assert kept == 20 - warm_up + other_rows
    assert len(calls) == 6 * 9 - (kept - other_rows) + warm_up
    assert summary.overall.num_requests == 6


def test_prompt_longer_than_the_context(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt set questions, question 0: prompt of \d+ tokens, 500 new") as caught:
        run(project, max_new_tokens=500)
    assert "\n" not in str(caught.value)


def test_too_few_held_out_prompts_to_tune_on(project: Project, tmp_path: Path) -> None:
    params, paths = project
    job = family_job("tiny", params.families["tiny"], params, paths)
    write_jsonl(tmp_path / "eval.jsonl", [])
    with pytest.raises(UserError, match="too few to choose num_speculative_tokens on"):
        load_questions(job.model_copy(update={"heldout": tmp_path / "eval.jsonl"}))


def records_without_times(project: Project) -> list[dict[str, Any]]:
    return without_times([json.loads(line) for line in (project[1].bench / "records.jsonl").read_text().splitlines()])


def test_shares_put_together_are_the_same_records(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    params, paths = project
    changes = {"sweep": [2], "seed": 11}
    measured = run(project, **changes)[1].identity.draft_dtype
    whole = records_without_times(project)
    args = ("tiny", family_of(project, **changes), params, paths)
    with pytest.raises(UserError, match="3 rows are missing"):  # stock generate(), K, costs
        stage.run_share(*args, Share(1, 3))
    stage.run_first(*args, Share(0, 3))
    for index in (1, 0):
        stage.run_share(*args, Share(index, 3))
    log = lambda values, step: None  # noqa: E731
    with pytest.raises(UserError, match="rows are missing although every share is done"):
        stage.run(*args, log, MERGE)
    stage.run_share(*args, Share(2, 3))
    # put together where a draft would decode in another dtype, by a coordinator without a GPU, say
    monkeypatch.setattr(measuring, "_draft_dtype", lambda job, device: torch.float16)
    metrics = stage.run(*args, log, MERGE)
    assert records_without_times(project) == whole
    summary = family_summary(paths)
    assert summary.overall.lossless is True and summary.identity.device == "cpu"
    assert summary.identity.draft_dtype == measured != "float16"
    assert metrics["num_speculative_tokens"] == 2 and metrics["stock_generate_tok_s"] > 0
    assert not list(paths.state.rglob("bench*.jsonl"))


def test_shares_of_different_machines_are_not_mixed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    params, paths = project
    changes = {"num_speculative_tokens": 1, "stock_generate": False, "cost_tokens": [], "seed": 12}
    args = ("tiny", family_of(project, **changes), params, paths)
    stage.run_share(*args, Share(0, 2))
    known = measuring.identity
    monkeypatch.setattr(measuring, "identity", lambda *a: known(*a).changed(device="another GPU"))
    stage.run_share(*args, Share(1, 2))
    with pytest.raises(UserError, match="shares of 2 kinds of machine"):
        stage.run(*args, lambda values, step: None, MERGE)
