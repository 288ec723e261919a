"""The whole pipeline by `dvc repro`, in a fresh git and DVC project, on a tiny target made on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from specflow.tracking.store import open_store
from tests.projects import Project, make_project
from tests.toys import tiny_params

STAGES = ["fetch", "prepare", "sample", "vocab", "extract", "train_offline", "export", "bench"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project that has run once."""
    folder = tmp_path_factory.mktemp("project")
    made = make_project(folder, tiny_params(folder))
    assert made.repro() == [*(f"{stage}@tiny" for stage in STAGES), "report"]
    yield made


def test_outputs_agree_with_each_other(project: Project) -> None:
    base = "artifacts/tiny"
    assert all((project.folder / f"{base}/metrics/{stage}.json").exists() for stage in STAGES)
    rows = {
        split: [
            json.loads(line) for line in (project.folder / f"{base}/samples/{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "eval")
    }
    assert (len(rows["train"]), len(rows["eval"])) == (24, 6)
    assert not {row["id"] for row in rows["train"]} & {row["id"] for row in rows["eval"]}
    manifest = project.json(f"{base}/hidden_states.json")
    captured = {row["id"]: row for row in manifest["rows"]}
    for row in (*rows["train"], *rows["eval"]):
        assert captured[row["id"]]["length"] == len(row["token_ids"])
    config = project.json(f"{base}/export/eagle3/config.json")
    assert (
        config["draft_vocab_size"] == 128 and config["vocab_size"] == project.json(f"{base}/target.json")["vocab_size"]
    )
    best = max(point["expected_acceptance_length"] for point in project.json(f"{base}/plots/eval.json"))
    assert project.json(f"{base}/metrics/train_offline.json")["expected_acceptance_length"] == pytest.approx(best)


def test_benchmark_is_lossless_and_its_identities_hold(project: Project) -> None:
    summary = project.json("artifacts/tiny/bench/summary.json")
    assert set(summary["sets"]) == {"questions", "heldout"}
    for result in summary["sets"].values():
        assert result["lossless"] is True
        assert result["acceptance_length"] == pytest.approx(1 + sum(result["survival"]))
        assert result["speedup"] == pytest.approx(result["tok_s"] / result["baseline_tok_s"])
    html = (project.folder / "report/report.html").read_text(encoding="utf-8")
    assert f"{summary['sets']['questions']['acceptance_length']:.2f}" in html
    table = project.run("specflow", "results")
    assert "questions" in table and "yes" in table and "report.html" in table and "mlflow ui" in table


def test_mlflow_has_a_parent_with_every_stage(project: Project) -> None:
    client = open_store(project.folder)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = [run for run in runs if "pipeline" in run.data.tags and "bench/speedup" in run.data.metrics]
    first = min(parents, key=lambda run: run.info.start_time)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == first.info.run_id]
    assert {run.data.tags["stage"] for run in children} == {*STAGES, "report"}
    assert {run.info.status for run in children} == {"FINISHED"}
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    for stage in STAGES[:-1]:  # bench may have run again in another test
        run = next(run for run in children if run.data.tags["stage"] == stage)
        outs = {
            out["path"]: out["md5"] for out in lock[f"{stage}@tiny"]["outs"] if out["path"].endswith(f"{stage}.json")
        }
        assert outs[f"artifacts/tiny/metrics/{stage}.json"] == run.data.tags["metrics_md5"]


def test_nothing_changed_runs_nothing_and_a_bench_parameter_runs_bench_and_report(project: Project) -> None:
    assert project.repro() == []
    project.set("families", "tiny", "bench", "max_new_tokens", value=8)
    assert project.repro() == ["bench@tiny", "report"]
    client = open_store(project.folder)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.pipeline LIKE 'dvc%'")
    newest = max(runs, key=lambda run: run.info.start_time)
    reused = {tag.removeprefix("reused.") for tag in newest.data.tags if tag.startswith("reused.")}
    assert reused == set(STAGES) - {"bench"}
    assert newest.data.metrics["train/expected_acceptance_length"] >= 1.0
    assert "nothing missing" in project.run("specflow", "mlflow-sync")


def test_dvc_shows_metrics_and_plots(project: Project) -> None:
    metrics = json.loads(project.run("dvc", "metrics", "show", "--json"))[""]["data"]
    assert metrics["artifacts/tiny/metrics/bench.json"]["data"]["lossless_rate"] == 1.0
    plots = json.loads(project.run("dvc", "plots", "show", "--json").splitlines()[-1])["data"]
    for name in ("training", "eval", "survival", "sweep", "coverage"):
        assert plots[f"artifacts/tiny/plots/{name}.json"], name


def test_results_are_committed_and_compared_and_experiments_run(project: Project) -> None:
    """What `git add .` takes after a run is small text: metrics, plots and the lock; DVC ignores the rest."""
    project.run("git", "add", ".gitignore", "artifacts", "dvc.yaml", "dvc.lock", "params.yaml", ".dvc", ".dvcignore")
    committed = project.run("git", "diff", "--cached", "--name-only").split()
    assert "artifacts/tiny/metrics/bench.json" in committed and "artifacts/tiny/plots/eval.json" in committed
    assert not [name for name in committed if name.endswith((".safetensors", ".jsonl"))]
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "results")
    said = project.run("dvc", "exp", "run", "-S", "families.tiny.bench.max_new_tokens=5")
    assert re.findall(r"Running stage '([^']+)'", said) == ["inputs@tiny", "bench@tiny", "report"]
    assert project.json("artifacts/tiny/bench/summary.json")["settings"]["max_new_tokens"] == 5
    changed = json.loads(project.run("dvc", "metrics", "diff", "--json"))["artifacts/tiny/metrics/bench.json"]
    assert changed["tok_s"]["old"] > 0 and changed["tok_s"]["new"] > 0


def test_a_family_trains_the_way_it_is_listed(project: Project) -> None:
    said = project.run("specflow", "train_online", "tiny", code=2)
    assert said.count("\n") == 1 and "run train_offline" in said
