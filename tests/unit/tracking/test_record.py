"""The MLflow record, on a real sqlite store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow import files
from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.tracking import record, results, view
from specflow.tracking.store import STORE, open_store
from tests.evidence import write_bench


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(record, "_pipeline_key", lambda: "dvc 1 1.00")
    return open_store(Path())


def run_stage(stage: str, params: Params, paths: Paths, metrics: dict[str, float], curve: int = 0) -> None:
    """What specflow.stage does around a stage."""
    with record.stage_run(stage, "tiny", params, paths) as run:
        for step in range(curve):
            run.log({"train/loss_0": 1.0 / (step + 1)}, step)
        files.write_json(paths.metrics(stage), metrics)
        run.finish(metrics)
        if stage == "report":
            run.link_reused()


def write_lock(paths: Paths, stages: list[str]) -> None:
    """dvc.lock as DVC writes it: the md5 of each metrics file, under the path relative to the project."""
    entries = {}
    for stage in stages:
        file = paths.metrics(stage)
        digest = hashlib.md5(file.read_bytes()).hexdigest()
        locked = {"params.yaml": {f"families.tiny.{stage}": {"lr": 0.5}}}
        entries[f"{stage}@tiny"] = {"params": locked, "outs": [{"path": str(file), "md5": digest}]}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}), encoding="utf-8")


def all_runs(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))


def by_stage(client: Any) -> dict[str | None, Any]:
    return {run.data.tags.get("stage"): run for run in all_runs(client)}


def test_stages_of_one_pipeline_run_share_a_parent(client: Any, params: Params, paths: Paths) -> None:
    run_stage("vocab", params, paths, {"coverage": 0.5})
    run_stage("train_offline", params, paths, {"expected_acceptance_length": 1.5}, curve=3)
    runs = by_stage(client)
    parent = runs["pipeline"]
    assert set(runs) == {"pipeline", "vocab", "train_offline"}
    for stage in ("vocab", "train_offline"):
        assert runs[stage].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[stage].info.status == "FINISHED"
        assert runs[stage].data.params["train.lr"] == "0.001"
    assert parent.info.status == "FINISHED"
    assert runs["train_offline"].data.metrics["train/expected_acceptance_length"] == 1.5
    curve = client.get_metric_history(runs["train_offline"].info.run_id, "train/loss_0")
    assert [(point.step, point.value) for point in curve] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    tags = runs["vocab"].data.tags
    assert (tags["family"], tags["method"], tags["mode"]) == ("tiny", "eagle3", "offline")
    assert tags["metrics_md5"] == hashlib.md5(paths.metrics("vocab").read_bytes()).hexdigest()


def test_a_run_names_the_lock_it_ran_under(client: Any, params: Params, paths: Paths) -> None:
    run_stage("vocab", params, paths, {"coverage": 0.5})
    write_lock(paths, ["vocab"])
    run_stage("train_offline", params, paths, {"expected_acceptance_length": 1.5})
    runs = by_stage(client)
    assert "dvc_lock_md5" not in runs["vocab"].data.tags
    assert runs["train_offline"].data.tags["dvc_lock_md5"] == hashlib.md5(Path("dvc.lock").read_bytes()).hexdigest()


def test_bench_has_the_fixed_names(client: Any, params: Params, paths: Paths) -> None:
    run_stage("bench", params, paths, write_bench(paths, {"a": 1.25, "b": 1.25, "c": 1.25}))
    bench = by_stage(client)["bench"]
    expected = {
        **{f"accept/length{end}": 2.0 for end in ("", "_low", "_high", "_macro")},
        "accept/pos_1": 1.0,
        "bench/speedup": 1.25,
        "bench/speedup_low": 1.25,
        "bench/speedup_high": 1.25,
        "bench/speedup_mean_of_ratios": 1.25,
        "bench/tok_s": 13 / 0.8,
        "bench/baseline_tok_s": 13.0,
        "bench/lossless": 1.0,
        "bench/lossless_rate": 1.0,
        "bench/num_speculative_tokens": 1.0,
        "bench/seconds": 8.0,
        "bench/gpu_seconds": 16.0,
        **{f"questions/accept_length{end}": 2.0 for end in ("", "_low", "_high", "_macro")},
        "questions/accept_pos_1": 1.0,
        **{f"questions/bench_speedup{end}": 1.25 for end in ("", "_low", "_high", "_mean_of_ratios")},
        "questions/bench_tok_s": 13 / 0.8,
        "questions/bench_baseline_tok_s": 13.0,
        "questions/bench_lossless": 1.0,
    }
    assert bench.data.metrics == pytest.approx(expected)
    assert bench.data.tags["machine"] == "Some CPU, 2 threads, cpu"
    artifacts = {artifact.path for artifact in client.list_artifacts(bench.info.run_id)}
    assert artifacts == {"summary.json", "records.jsonl", "draft"}


def test_training_and_vocabulary_have_the_fixed_names(paths: Paths) -> None:
    trained = {"train_tokens": 1000, "train_tok_s": 250.0, "train_s": 12.0, "final_loss": 2.0}
    assert results.headline("train_online", trained, paths) == {
        "train/tokens": 3000.0,  # three epochs of 1000
        "train/tokens_per_epoch": 1000.0,
        "train/tok_s": 250.0,
        "train/loop_seconds": 12.0,
        "train/final_loss": 2.0,
    }
    covered = results.headline("vocab", {"coverage_eval": 0.9, "coverage_train": 1.0}, paths)
    assert covered == {"vocab/coverage": 0.9, "vocab/coverage_train": 1.0}


def test_costs_are_summed_over_the_stages_that_know_theirs(paths: Paths) -> None:
    for stage, metrics in {
        "vocab": {"seconds": 2.0},
        "train_offline": {"seconds": 30.0, "gpu_seconds": 60.0, "gpu_joules": 9.0},
        "extract": {"seconds": 10.0, "gpu_seconds": 10.0},
        "train_online": {"seconds": 500.0},
    }.items():
        files.write_json(paths.metrics(stage), metrics)
    stages = results.measured_stages(paths, "offline")
    assert stages == ["extract", "train_offline", "vocab"]  # not what another mode left behind
    metrics = results.family_metrics(paths, stages)
    costs = {key: value for key, value in metrics.items() if key.startswith("cost/")}
    assert costs == {"cost/seconds": 42.0, "cost/gpu_seconds": 70.0, "cost/gpu_joules": 9.0}


def test_a_failing_and_a_stopped_stage_end_their_runs(client: Any, params: Params, paths: Paths) -> None:
    for error, stage in ((RuntimeError, "vocab"), (SystemExit, "extract")):
        with pytest.raises(error), record.stage_run(stage, "tiny", params, paths):
            raise error
    runs = by_stage(client)
    assert (runs["vocab"].info.status, runs["extract"].info.status) == ("FAILED", "KILLED")


def test_cached_stages_show_in_the_next_pipeline_run(
    client: Any, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("vocab", params, paths, {"coverage": 0.5})
    first = by_stage(client)["vocab"].info.run_id
    monkeypatch.setattr(record, "_pipeline_key", lambda: "dvc 2 2.00")
    run_stage("train_offline", params, paths, {"final_loss": 7})
    write_lock(paths, ["vocab", "train_offline"])
    run_stage("report", params, paths, {})
    parent = next(run for run in all_runs(client) if run.data.tags.get("pipeline") == "dvc 2 2.00")
    assert parent.data.tags["reused.vocab"] == first
    assert "reused.train_offline" not in parent.data.tags
    assert parent.data.metrics == {"vocab/coverage": 0.5, "train/final_loss": 7}


def test_sync_rebuilds_once(store: Path, params: Params, paths: Paths) -> None:
    files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
    files.write_json(paths.metrics("train_offline"), {"expected_acceptance_length": 1.5})
    files.write_json(paths.plot("training.json"), [{"step": 1, "loss_0": 2.0}, {"step": 2, "loss_0": 1.0}])
    write_lock(paths, ["vocab", "train_offline"])
    files.write_json(paths.metrics("export"), {"bytes": 7})  # not in the lock: nobody vouches for it
    assert sorted(record.sync("tiny", params, paths)) == ["train_offline", "vocab"]
    client = open_store(Path())
    runs = by_stage(client)
    assert set(runs) == {"pipeline", "vocab", "train_offline"}
    assert runs["train_offline"].data.params["train_offline.lr"] == "0.5"
    history = client.get_metric_history(runs["train_offline"].info.run_id, "train/loss_0")
    assert [point.value for point in history] == [2.0, 1.0]
    assert runs["pipeline"].data.metrics["vocab/coverage"] == 0.5
    assert record.sync("tiny", params, paths) == []
    assert len(all_runs(client)) == 3
    assert len(client.get_metric_history(runs["pipeline"].info.run_id, "vocab/coverage")) == 1


def test_sync_trusts_only_files_that_the_lock_describes(store: Path, params: Params, paths: Paths) -> None:
    files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
    write_lock(paths, ["vocab"])
    files.write_json(paths.metrics("vocab"), {"coverage": 0.9})
    assert record.sync("tiny", params, paths) == []


@pytest.mark.parametrize("damage", ["folder", "garbage"])
def test_an_unusable_store_costs_one_warning(
    project: Path, params: Params, paths: Paths, mlflow_warnings: list[str], damage: str
) -> None:
    store = Path(STORE)
    if damage == "folder":
        store.mkdir()
    else:
        store.write_bytes(b"this is no database" * 100)
    run_stage("vocab", params, paths, {"coverage": 0.5}, curve=3)
    assert paths.metrics("vocab").exists()
    assert len(mlflow_warnings) == 1
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        open_store(Path())


def test_a_store_that_breaks_midway_costs_one_warning(
    client: Any, params: Params, paths: Paths, mlflow_warnings: list[str]
) -> None:
    with record.stage_run("vocab", "tiny", params, paths) as run:
        Path(STORE).write_bytes(b"gone" * 1000)
        files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
        run.finish({"coverage": 0.5})
        run.log({"x": 1.0}, 1)
    assert len(mlflow_warnings) == 1


def test_a_second_pipeline_run_with_everything_cached_compares_too(
    client: Any, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("vocab", params, paths, {"coverage_eval": 0.5})
    run_stage("bench", params, paths, write_bench(paths, {"a": 1.25, "b": 1.25, "c": 1.25}))
    write_lock(paths, ["vocab", "bench"])
    ran = {stage: run.info.run_id for stage, run in by_stage(client).items()}
    parents = record.link_pipeline("prefect it's", ["tiny"], params, {"prefect_flow_run": "abc"})
    runs = {run.info.run_id: run for run in all_runs(client)}
    assert len(runs) == 4
    parent = runs[parents["tiny"]]
    assert parent.info.status == "FINISHED"
    tags = parent.data.tags
    assert (tags["reused.vocab"], tags["reused.bench"]) == (ran["vocab"], ran["bench"])
    assert (tags["prefect_flow_run"], tags["pipeline"], tags["machine"]) == (
        "abc",
        "prefect its",
        "Some CPU, 2 threads, cpu",
    )
    assert tags["mlflow.note.content"].startswith("Pays: 1.25x")
    assert parent.data.params["train.lr"] == "0.001"
    fixed = {"accept/length": 2.0, "bench/speedup": 1.25, "vocab/coverage": 0.5, "cost/gpu_seconds": 16.0}
    assert fixed.items() <= parent.data.metrics.items()
    # Again: the same parent, no second point.
    assert record.link_pipeline("prefect it's", ["tiny"], params, {"prefect_flow_run": "abc"}) == parents
    assert len(all_runs(client)) == 4
    assert len(client.get_metric_history(parents["tiny"], "bench/speedup")) == 1


def test_a_linked_number_that_changed_is_the_newest_one(client: Any, params: Params, paths: Paths) -> None:
    for coverage in (0.9, 0.5):
        files.write_json(paths.metrics("vocab"), {"coverage_eval": coverage})
        write_lock(paths, ["vocab"])
        parent_id = record.link_pipeline("key", ["tiny"], params, {})["tiny"]
    assert client.get_run(parent_id).data.metrics["vocab/coverage"] == 0.5


def test_results_of_an_older_draft_are_not_this_pipelines(paths: Paths) -> None:
    """train ran again and export did not: export and bench, whose files still lie there, belong to the old draft."""
    for stage in ("train_offline", "export", "bench", "vocab"):
        files.write_json(paths.metrics(stage), {"x": 1.0})
    write_lock(paths, ["vocab", "train_offline", "export", "bench"])
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    for stage, made, used, digest in (
        ("train_offline", "draft", None, "new"),
        ("export", "export", "draft", "new"),
        ("bench", "bench", "export", "same"),
    ):
        entry = lock["stages"][f"{stage}@tiny"]
        entry["outs"].append({"path": f"artifacts/tiny/{made}", "md5": "same" if made == "export" else "new"})
        if used:
            entry["deps"] = [{"path": f"artifacts/tiny/{used}", "md5": digest}]
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    assert set(results.locked_stages(paths, "offline")) == {"vocab", "train_offline", "export", "bench"}
    lock["stages"]["export@tiny"]["deps"][0]["md5"] = "old"
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    assert set(results.locked_stages(paths, "offline")) == {"vocab", "train_offline"}


def test_the_parent_is_as_its_stages_are(client: Any, params: Params, paths: Paths) -> None:
    with record.stage_run("vocab", "tiny", params, paths):
        with pytest.raises(RuntimeError), record.stage_run("extract", "tiny", params, paths):
            raise RuntimeError
        assert by_stage(client)["pipeline"].info.status == "RUNNING"
    assert by_stage(client)["pipeline"].info.status == "FAILED"
    run_stage("extract", params, paths, {"rows": 1})  # tried again, and it went well
    assert by_stage(client)["pipeline"].info.status == "FINISHED"


def test_the_end_of_a_pipeline_ends_what_a_killed_stage_left_open(client: Any, params: Params, paths: Paths) -> None:
    run_stage("vocab", params, paths, {"coverage_eval": 0.5})
    parent_id = by_stage(client)["pipeline"].info.run_id
    tags = {"stage": "extract", "mlflow.parentRunId": parent_id}
    client.create_run(client.get_run(parent_id).info.experiment_id, tags=tags)
    assert record.link_pipeline("dvc 1 1.00", ["tiny"], params, {}) == {"tiny": parent_id}
    runs = by_stage(client)
    assert (runs["extract"].info.status, runs["pipeline"].info.status) == ("KILLED", "KILLED")


def test_an_experiment_opens_on_its_pipeline_runs(client: Any, params: Params, paths: Paths) -> None:
    """The saved view finds pipeline runs alone and names what a finished one has."""
    write_bench(paths, {"a": 1.25, "b": 1.25, "c": 1.25})
    files.write_json(paths.metrics("vocab"), {"coverage_eval": 0.5})
    files.write_json(paths.metrics("train_offline"), {"train_tok_s": 10.0, "train_s": 2.0})
    write_lock(paths, ["bench", "vocab", "train_offline"])
    parent_id = record.link_pipeline("key", ["tiny"], params, {})["tiny"]
    run, experiment = client.get_run(parent_id), client.get_experiment_by_name("tiny")
    saved = json.loads(experiment.tags[view.VIEW_TAG])
    state = json.loads(saved["state"])
    (found,) = client.search_runs([experiment.experiment_id], state["searchFilter"])
    assert found.info.run_id == parent_id
    columns = {name.partition(".")[0]: set() for name in state["selectedColumns"]}
    for name in state["selectedColumns"]:
        kind, _, key = name.partition(".")
        columns[kind].add(key.strip("`"))
    assert columns["metrics"] <= set(run.data.metrics)
    assert columns["params"] <= set(run.data.params) and columns["tags"] <= set(run.data.tags)
    assert next(iter(run.data.metrics)) == "accept/length"  # what MLflow's compare page plots unasked


def test_what_one_part_loses_the_others_keep_and_the_run_is_ended(
    client: Any, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch, mlflow_warnings: list[str]
) -> None:
    """MLflow refuses the metrics: digests and files are there all the same, and nothing is left as if it still ran."""

    def refuse(*_: object) -> None:
        raise ValueError("Invalid value for metric")

    summary = write_bench(paths, {"a": 1.25, "b": 1.25, "c": 1.25})
    with record.stage_run("bench", "tiny", params, paths) as run:
        monkeypatch.setattr(record, "log_points", refuse)
        run.finish(summary)
    done = by_stage(client)
    assert done["bench"].info.status == "FAILED" and done["bench"].data.metrics == {}
    assert done["bench"].data.tags["draft_digest"] and client.list_artifacts(done["bench"].info.run_id)
    assert done["pipeline"].info.status != "RUNNING"
    assert len(mlflow_warnings) == 1 and "Invalid value for metric" in mlflow_warnings[0]


def test_a_record_that_cannot_begin_is_ended(
    client: Any, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch, mlflow_warnings: list[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("Invalid parameter")

    monkeypatch.setattr(record, "log_params", refuse)
    with record.stage_run("vocab", "tiny", params, paths) as run:
        run.finish({"coverage": 0.5})
    assert by_stage(client)["vocab"].info.status == "FAILED" and len(mlflow_warnings) == 1
