"""`specflow compare`: the numbers are the files' and the runs', and what cannot be compared is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from specflow import files
from specflow.cli import cli
from specflow.compare.command import collect
from specflow.compare.promote import promote
from specflow.config import Params, load_params
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.tracking import record, results
from specflow.tracking.store import open_store
from tests.evidence import write_bench
from tests.unit.report.test_report import Page

SPEEDUPS = {"a": 1.25, "b": 1.25, "c": 1.25}


@pytest.fixture
def two_families(project: Path) -> Params:
    """`tiny` offline and `other` online, the latter faster and trained with another learning rate."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["families"]["other"] = json.loads(json.dumps(raw["families"]["tiny"]))
    raw["families"]["other"]["train"]["lr"] = 0.01
    raw["online"] = ["other"]
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    for name, stage, speedup in (("tiny", "train_offline", 1.25), ("other", "train_online", 1.5)):
        paths = Paths(root=Path(), family=name, cache=Path())
        write_bench(paths, dict.fromkeys(SPEEDUPS, speedup), draft=name)
        trained = {"train_tok_s": 1000.0, "train_s": 1234.0, "seconds": 1300.0, "gpu_seconds": 1300.0}
        files.write_json(paths.metrics(stage), trained)
        files.write_json(paths.metrics("vocab"), {"coverage_eval": 0.897, "seconds": 2.0})
    return load_params(Path("params.yaml"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["compare", *arguments])


def refused(*names: str) -> str:
    with pytest.raises(UserError) as caught:
        collect(Path("params.yaml"), names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cells(output: str, name: str) -> list[str]:
    """A row of the table, by its columns: at least two spaces lie between them."""
    return re.split(r" {2,}", next(line for line in output.splitlines() if line.startswith(name)))


def test_the_table_says_what_the_files_say(two_families: Params) -> None:
    output = run().stdout
    interval, rest = "1.25x [1.25, 1.25]", ["16.2", "13.0", "yes", "89.7%", "1 234 000", "1316", "0.36"]
    assert cells(output, "tiny") == ["tiny", "eagle3", "offline", "1", "2.00 [2.00, 2.00]", "1.00", interval, *rest]
    interval, rest = "1.50x [1.50, 1.50]", ["19.5", "13.0", "yes", "89.7%", "1 234 000", "1316", "0.36"]
    assert cells(output, "other") == ["other", "eagle3", "online", "1", "2.00 [2.00, 2.00]", "1.00", interval, *rest]
    assert cells(output, "train.lr") == ["train.lr", "0.001", "0.01"]
    assert "Not the same" not in output
    assert "other" not in run("tiny").stdout


def test_json_holds_the_fixed_names(two_families: Params) -> None:
    entries = {entry["label"]: entry for entry in json.loads(run("--json").stdout)["entries"]}
    expected = {
        "accept/length": 2.0,
        "accept/pos_1": 1.0,
        "bench/speedup": 1.5,
        "vocab/coverage": 0.897,
        "train/tokens": 1234000.0,
        "cost/gpu_seconds": 1316.0,
        "cost/seconds": 1310.0,
    }
    found = entries["other"]["metrics"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert entries["other"]["mode"] == "online" and entries["other"]["source"] == "files"


def test_what_was_not_measured_is_left_open(two_families: Params, paths: Paths) -> None:
    write_bench(paths, SPEEDUPS, draft="tiny")
    files.write_json(paths.metrics("bench"), {"speedup": 1.25})  # an older run: no cost, no K
    for stage in ("train_offline", "vocab"):
        paths.metrics(stage).unlink()
    row = cells(run("tiny").stdout, "tiny")
    assert row == [
        "tiny",
        "eagle3",
        "offline",
        "2.00 [2.00, 2.00]",
        "1.00",
        "1.25x [1.25, 1.25]",
        "16.2",
        "13.0",
        "yes",
    ]


def test_other_conditions_are_said(two_families: Params, paths: Paths) -> None:
    write_bench(paths, SPEEDUPS, draft="tiny", device="H100")
    output = run().stdout
    assert "Not the same machine" in output
    assert "Some CPU, 2 threads, H100: tiny; Some CPU, 2 threads, cpu: other" in output


def test_the_page_needs_nothing_else_and_has_the_numbers(two_families: Params) -> None:
    done = run("--html", "out/compare.html")
    assert done.exit_code == 0, done.output
    html = Path("out/compare.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads == [] and len(page.charts) == html.count('<svg class="drawn"') == 7
    assert len(page.ids) == len(set(page.ids))
    for text in ("1.50x [1.50, 1.50]", "1 234 000", "89.7%", "0.001", "Survival by position", "GPU-seconds"):
        assert text in html, text


def test_errors_are_one_line(two_families: Params, store: Path, paths: Paths) -> None:
    assert refused("tinny").startswith("unknown name 'tinny': params.yaml has ['other', 'tiny']")
    assert "has no pipeline run of 'tiny' with a benchmark" in refused("tiny@latest")
    assert "after the @ comes latest, all or champion" in refused("tiny@newest")
    assert "no champion yet" in refused("tiny@champion")
    assert "has no run 0123" in refused("0123456789abcdef" * 2)
    (paths.bench / "summary.json").unlink()
    assert "run `dvc repro bench@tiny` first" in refused("tiny")
    assert [entry.label for entry in collect(Path("params.yaml"), [])] == ["other"]


def test_nothing_to_compare(project: Path) -> None:
    assert "nothing to compare" in refused()


def test_runs_of_the_store_compare_with_files(two_families: Params, store: Path, paths: Paths) -> None:
    """Two pipeline runs of one family, by @all, by id and by @champion, have the numbers of their own day."""
    ids = []
    for key, speedup in (("first", 1.25), ("second", 1.5)):
        with record.stage_run("bench", "tiny", two_families, paths) as stage:
            stage.finish(write_bench(paths, dict.fromkeys(SPEEDUPS, speedup), draft=key))
        lock = {
            "bench@tiny": {"outs": [{"path": str(paths.metrics("bench")), "md5": results.md5(paths.metrics("bench"))}]}
        }
        Path("dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
        ids.append(record.link_pipeline(key, ["tiny"], two_families, {})["tiny"])
        if key == "first":
            assert promote("tiny", two_families, paths).promote
    speeds = {entry.label: entry.metrics["bench/speedup"] for entry in collect(Path("params.yaml"), ["tiny@all"])}
    assert speeds == pytest.approx({f"tiny@{ids[0][:8]}": 1.25, f"tiny@{ids[1][:8]}": 1.5})
    (latest,) = collect(Path("params.yaml"), ["tiny@latest", ids[1]])  # the same run twice is one row
    assert latest.source == ids[1] and latest.metrics["cost/gpu_seconds"] == 16.0
    (best,) = collect(Path("params.yaml"), ["tiny@champion"])
    assert best.metrics["bench/speedup"] == pytest.approx(1.25)
    mixed = run(ids[0], "tiny").stdout
    assert cells(mixed, f"tiny@{ids[0][:8]}")[6] == "1.25x [1.25, 1.25]" and cells(mixed, "tiny ")[6][:5] == "1.50x"


def test_a_run_without_a_benchmark_names_its_pipeline(two_families: Params, store: Path, paths: Paths) -> None:
    with record.stage_run("vocab", "tiny", two_families, paths) as stage:
        stage.finish({"coverage_eval": 0.5})
    client: Any = open_store(Path())
    experiment = client.get_experiment_by_name("tiny")
    (child,) = client.search_runs([experiment.experiment_id], "tags.stage = 'vocab'")
    parent = child.data.tags["mlflow.parentRunId"]
    assert refused(child.info.run_id).endswith(f"(vocab) has no benchmark: its pipeline run is {parent}")
