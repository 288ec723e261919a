"""The MLflow record, on a real sqlite store."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow import files, tracking
from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths

RESULT = {
    "acceptance_length": 1.75,
    "survival": [0.5, 0.25],
    "speedup": 1.2,
    "speedup_ci": [1.1, 1.3],
    "tok_s": 60.0,
    "baseline_tok_s": 50.0,
    "lossless": True,
}
SUMMARY = {"overall": RESULT, "sets": {"questions": {**RESULT, "acceptance_length": 1.5, "lossless": None}}}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store: making one takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("store")
    tracking.open_store(home)
    return home / tracking.STORE


@pytest.fixture
def store(project: Path, empty_store: Path) -> Path:
    return Path(shutil.copy(empty_store, project / tracking.STORE))


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tracking, "_pipeline_key", lambda: "dvc 1 1.00")
    return tracking.open_store(Path())


def run_stage(stage: str, params: Params, paths: Paths, metrics: dict[str, float], curve: int = 0) -> None:
    """What specflow.stage does around a stage."""
    with tracking.stage_run(stage, "tiny", params, paths) as run:
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
    parent = runs[None]
    assert set(runs) == {None, "vocab", "train_offline"}
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
    files.write_json(paths.bench / "summary.json", SUMMARY)
    run_stage("bench", params, paths, {"tok_s": 60.0})
    metrics = by_stage(client)["bench"].data.metrics
    expected = {
        "accept/length": 1.75,
        "accept/pos_1": 0.5,
        "accept/pos_2": 0.25,
        "bench/speedup": 1.2,
        "bench/tok_s": 60.0,
        "bench/baseline_tok_s": 50.0,
        "accept/length.questions": 1.5,
    }
    assert expected.items() <= metrics.items()
    assert "bench/lossless.questions" not in metrics  # sampled: it has no value
    artifacts = client.list_artifacts(by_stage(client)["bench"].info.run_id)
    assert [artifact.path for artifact in artifacts] == ["summary.json"]


def test_a_failing_and_a_stopped_stage_end_their_runs(client: Any, params: Params, paths: Paths) -> None:
    for error, stage in ((RuntimeError, "vocab"), (SystemExit, "extract")):
        with pytest.raises(error), tracking.stage_run(stage, "tiny", params, paths):
            raise error
    runs = by_stage(client)
    assert (runs["vocab"].info.status, runs["extract"].info.status) == ("FAILED", "KILLED")


def test_cached_stages_show_in_the_next_pipeline_run(
    client: Any, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("vocab", params, paths, {"coverage": 0.5})
    first = by_stage(client)["vocab"].info.run_id
    monkeypatch.setattr(tracking, "_pipeline_key", lambda: "dvc 2 2.00")
    run_stage("export", params, paths, {"bytes": 7})
    write_lock(paths, ["vocab", "export"])
    run_stage("report", params, paths, {})
    parent = next(run for run in all_runs(client) if run.data.tags.get("pipeline") == "dvc 2 2.00")
    assert parent.data.tags["reused.vocab"] == first
    assert "reused.export" not in parent.data.tags
    assert parent.data.metrics["vocab/coverage"] == 0.5
    assert parent.data.metrics["export/bytes"] == 7


def test_sync_rebuilds_once(store: Path, params: Params, paths: Paths) -> None:
    files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
    files.write_json(paths.metrics("train_offline"), {"expected_acceptance_length": 1.5})
    files.write_json(paths.plot("training.json"), [{"step": 1, "loss_0": 2.0}, {"step": 2, "loss_0": 1.0}])
    write_lock(paths, ["vocab", "train_offline"])
    files.write_json(paths.metrics("export"), {"bytes": 7})  # not in the lock: nobody vouches for it
    assert sorted(tracking.sync("tiny", params, paths)) == ["train_offline", "vocab"]
    client = tracking.open_store(Path())
    runs = by_stage(client)
    assert set(runs) == {None, "vocab", "train_offline"}
    assert runs["train_offline"].data.params["train_offline.lr"] == "0.5"
    history = client.get_metric_history(runs["train_offline"].info.run_id, "train/loss_0")
    assert [point.value for point in history] == [2.0, 1.0]
    assert runs[None].data.metrics["vocab/coverage"] == 0.5
    assert tracking.sync("tiny", params, paths) == []
    assert len(all_runs(client)) == 3
    assert len(client.get_metric_history(runs[None].info.run_id, "vocab/coverage")) == 1


def test_sync_trusts_only_files_that_the_lock_describes(store: Path, params: Params, paths: Paths) -> None:
    files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
    write_lock(paths, ["vocab"])
    files.write_json(paths.metrics("vocab"), {"coverage": 0.9})
    assert tracking.sync("tiny", params, paths) == []


@pytest.mark.parametrize("damage", ["folder", "garbage"])
def test_an_unusable_store_costs_one_warning(
    project: Path, params: Params, paths: Paths, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store = Path(tracking.STORE)
    if damage == "folder":
        store.mkdir()
    else:
        store.write_bytes(b"this is no database" * 100)
    with caplog.at_level(logging.WARNING, "specflow"):
        logging.getLogger("specflow").propagate = True
        run_stage("vocab", params, paths, {"coverage": 0.5}, curve=3)
    assert paths.metrics("vocab").exists()
    assert len([record for record in caplog.records if "MLflow" in record.message]) == 1
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        tracking.open_store(Path())


def test_a_store_that_breaks_midway_costs_one_warning(
    client: Any, params: Params, paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("specflow").propagate = True
    with caplog.at_level(logging.WARNING, "specflow"), tracking.stage_run("vocab", "tiny", params, paths) as run:
        Path(tracking.STORE).write_bytes(b"gone" * 1000)
        files.write_json(paths.metrics("vocab"), {"coverage": 0.5})
        run.finish({"coverage": 0.5})
        run.log({"x": 1.0}, 1)
    assert len([record for record in caplog.records if "MLflow" in record.message]) == 1


def test_a_fresh_store_survives_being_opened_by_three_processes(project: Path) -> None:
    code = (
        "from pathlib import Path; from specflow import tracking as t;"
        "t.ensure_experiment(t.open_store(Path()), 'tiny', Path())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    outcomes = [(process.communicate()[1], process.returncode) for process in processes]
    assert [code for _, code in outcomes] == [0, 0, 0], outcomes
