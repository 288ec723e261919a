"""`specflow bench --output` on a tiny target: what it measures, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow.bench.command import benchmark
from specflow.bench.options import num_workers
from specflow.config import Params
from specflow.config_bench import DynamicTree
from specflow.errors import UserError
from specflow.files import sha256_file
from specflow.paths import Paths
from specflow.results.schema import Summary, read_summary
from tests.bench_project import make_bench_project, without_times
from tests.toys import make_tiny_target

PARAMS = Path("params.yaml")
QUICK: dict[str, Any] = {"references": False, "num_prompts": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    return make_bench_project(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def project(made: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, which is the current one."""
    monkeypatch.chdir(made[1].root)
    return made[1].root


def bench(output: Path, family: str | None = "tiny", *, resume: bool = False, **options: Any) -> Summary:
    benchmark(family, PARAMS, output, options, resume=resume)
    return summary_in(output)


def summary_in(folder: Path) -> Summary:
    return read_summary(folder / "summary.json", made_by="the test")


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]


def artifacts(project: Path) -> dict[str, str]:
    return {str(file): sha256_file(file) for file in sorted((project / "artifacts").rglob("*")) if file.is_file()}


def test_a_family_with_a_tree_changes_no_artifact(project: Path, tmp_path: Path) -> None:
    before, output = artifacts(project), tmp_path / "x"
    options = {"num_prompts": 2, "max_new_tokens": 12, "total_token": 8, "depth": 3, "tree_top_k": 3}
    lines = benchmark("tiny", PARAMS, output, options, resume=False)
    assert artifacts(project) == before
    assert sorted(file.name for file in output.iterdir()) == ["job.json", "records.jsonl", "summary.json"]
    summary = summary_in(output)
    assert summary.tree == DynamicTree(total_token=8, depth=3, top_k=3) and summary.num_speculative_tokens == 3
    assert summary.sweep == [] and summary.overall.lossless is True
    assert set(summary.overall.references) == {"lookup", "oracle", "null"}
    assert summary.overall.references["oracle"].acceptance_length > 2.5  # 11 tokens in 3 steps of 4
    assert summary.overall.references["null"].acceptance_length == 1.0
    drafted = {step[0] for row in rows_of(output) if row["engine"] == "draft" for step in row["steps"]}
    assert drafted == {7}
    job = json.loads((output / "job.json").read_text())
    assert job["bench"]["tree"]["total_token"] == 8 and set(job["digests"]) >= {"draft", "prompts.questions"}
    assert lines[0] == summary.verdict and any("a tree of 8 tokens, depth 3, top-k 3" in line for line in lines)
    assert any(line.startswith("oracle") for line in lines) and lines[-1].endswith(f"{output}/")


def test_without_a_project(made: tuple[Params, Paths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made[1].root
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    (tmp_path / "own.jsonl").write_text('{"question_id": "a", "category": "c", "turns": ["the cat sees"]}\n' * 1)
    options = {**QUICK, "target": str(root / "target"), "prompts": (str(tmp_path / "own.jsonl"),)}
    del options["num_prompts"]
    summary = bench(tmp_path / "x", None, draft=made[1].export / "eagle3", **options)
    assert summary.family == "target" and list(summary.sets) == ["own"]
    assert summary.num_speculative_tokens == 3 and summary.overall.lossless is True
    assert any("plain EAGLE-3 form" in note for note in summary.notes)
    with pytest.raises(UserError, match="no draft: give --draft FOLDER or --assistant"):
        bench(tmp_path / "y", None, **options)
    with pytest.raises(UserError, match="K auto is chosen on a family's held-out prompts"):
        bench(tmp_path / "y", None, draft=made[1].export / "eagle3", num_speculative_tokens="auto", **options)
    assert not (tmp_path / "y").exists()
    assert bench(tmp_path / "z", None, mode="baseline", **options).overall.speedup is None


def test_an_independent_model_drafts(project: Path, tmp_path: Path) -> None:
    """The target as its own draft accepts everything; beside an EAGLE-3 draft it is a reference row."""
    target = str(project / "target")
    alone = bench(
        tmp_path / "x", None, target=target, assistant=target, prompts=("questions",), num_speculative_tokens=2, **QUICK
    )
    assert alone.overall.acceptance_length > 2.9 and alone.overall.lossless is True
    beside = bench(tmp_path / "y", assistant=target, num_speculative_tokens=2, **QUICK)
    assert beside.overall.references["assistant"].acceptance_length > 2.9
    assert beside.overall.acceptance_length < 1.5
    with pytest.raises(UserError, match="an independent model drafts a chain"):
        tree = {"total_token": 8, "depth": 3, "tree_top_k": 3}
        bench(tmp_path / "z", None, target=target, assistant=target, prompts=("questions",), **tree, **QUICK)


def test_one_side_claims_no_speedup(project: Path, tmp_path: Path) -> None:
    alone = benchmark("tiny", PARAMS, tmp_path / "b", {**QUICK, "mode": "baseline"}, resume=False)
    drafted = benchmark(
        "tiny", PARAMS, tmp_path / "d", {**QUICK, "mode": "draft", "num_speculative_tokens": 2}, resume=False
    )
    assert alone[0].startswith("Target alone: ") and drafted[0].startswith("With the draft: ")
    assert {row["engine"] for row in rows_of(tmp_path / "b")} == {"baseline"}
    assert {row["engine"] for row in rows_of(tmp_path / "d")} == {"draft"}
    for folder in ("b", "d"):
        overall = summary_in(tmp_path / folder).overall
        assert overall.speedup is overall.speedup_ci is overall.lossless is None
    # both answer the same questions, and greedily they say the same
    answers = [{row["id"].rpartition("/")[0]: row["token_ids"] for row in rows_of(tmp_path / f)} for f in ("b", "d")]
    assert answers[0] == answers[1]


def test_samples_have_seeds_and_histories_of_their_own(project: Path, tmp_path: Path) -> None:
    options = {**QUICK, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "num_speculative_tokens": 2, "num_samples": 3}
    summary = bench(tmp_path / "x", prompts=("questions",), **options)
    rows = [row for row in rows_of(tmp_path / "x") if row["engine"] == "baseline" and row["repeat"] == 0]
    first = {row["sample"]: row for row in rows if row["question_id"] == rows[0]["question_id"] and row["turn"] == 0}
    second = {row["sample"]: row for row in rows if row["question_id"] == rows[0]["question_id"] and row["turn"] == 1}
    assert len(first) == len(second) == 3
    assert len({str(row["token_ids"]) for row in first.values()}) > 1
    assert len({row["num_prompt_tokens"] for row in first.values()}) == 1
    assert summary.overall.lossless is None and set(summary.overall.by_sample) == {0, 1, 2}
    # a later turn has the answer to the same sample before it: all engines and repeats share that prompt
    lengths: dict[tuple[str, int, int], set[int]] = {}
    for row in rows_of(tmp_path / "x"):
        lengths.setdefault((row["question_id"], row["turn"], row["sample"]), set()).add(row["num_prompt_tokens"])
    assert all(len(different) == 1 for different in lengths.values())


def test_batches(project: Path, tmp_path: Path) -> None:
    summary = bench(tmp_path / "x", batch_size=(2, 1), num_speculative_tokens=2, **QUICK)
    assert [row.batch_size for row in summary.batch] == [1, 2]
    assert all(row.lossless_rate == 1.0 and row.tok_s > 0 for row in summary.batch)


def test_question_range(project: Path, tmp_path: Path) -> None:
    options = {**QUICK, "prompts": ("questions",), "mode": "baseline"}
    del options["num_prompts"]
    bench(tmp_path / "x", question_begin=1, question_end=3, **options)
    assert [row["question_id"] for row in rows_of(tmp_path / "x") if row["repeat"] == row["turn"] == 0] == ["1", "2"]
    with pytest.raises(UserError, match=r"prompt set questions has 4 questions, none from 7 on: "):
        bench(tmp_path / "y", question_begin=7, **options)


def test_a_stopped_run_goes_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specflow.bench import runner

    options = {**QUICK, "num_speculative_tokens": 2, "prompts": ("questions",)}
    bench(tmp_path / "whole", **options)
    plain, calls = runner.generate, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(runner, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "x", **options)
    monkeypatch.setattr(runner, "generate", plain)
    kept = [
        json.loads(line)
        for line in next((tmp_path / "x" / "state").glob("bench/*/bench.jsonl")).read_text().splitlines()[1:]
    ]
    with pytest.raises(UserError, match="holds a benchmark: give another folder, or --resume"):
        bench(tmp_path / "x", **options)
    with pytest.raises(UserError) as caught:
        bench(tmp_path / "x", resume=True, **{**options, "temperature": 0.5, "max_new_tokens": 9})
    assert "bench.max_new_tokens 8 -> 9; bench.temperature 0.0 -> 0.5" in str(caught.value)
    bench(tmp_path / "x", resume=True, **options)
    assert without_times(rows_of(tmp_path / "x")) == without_times(rows_of(tmp_path / "whole"))
    measured = [row for row in kept if "engine" in row]
    assert len(measured) == 7 and all(row in rows_of(tmp_path / "x") for row in measured)  # their times too
    assert sorted(f.name for f in (tmp_path / "x").iterdir()) == ["job.json", "records.jsonl", "summary.json"]
    # a finished one is shown again, and nothing is measured
    monkeypatch.setattr(runner, "generate", killed)
    assert benchmark("tiny", PARAMS, tmp_path / "x", options, resume=True)[0].startswith("No conclusion")


def test_another_machine_does_not_go_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specflow.bench import measuring

    options = {**QUICK, "num_speculative_tokens": 2, "prompts": ("questions",)}
    known = measuring.identity
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(measuring, "identity", lambda *a: known(*a).changed(cpu="Some CPU"))
        elsewhere.setattr(measuring.Work, "records", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path / "x", **options)
    with pytest.raises(UserError, match=r"measured on another machine or by other versions \(cpu \"Some CPU\" -> "):
        bench(tmp_path / "x", resume=True, **options)


def _write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_input_is_one_line(project: Path, tmp_path: Path) -> None:
    good = {"question_id": 1, "turns": ["the cat"]}
    files = {
        "layout": _write(tmp_path / "layout.jsonl", good, {"question_id": 2, "prompts": ["x"]}),
        "twice": _write(tmp_path / "twice.jsonl", good, good),
        "empty": _write(tmp_path / "empty.jsonl", {"question_id": 1, "turns": []}),
        "long": _write(tmp_path / "long.jsonl", {"question_id": 7, "turns": ["the cat sees a dog " * 200]}),
        "text": _write(tmp_path / "text.jsonl", "no object"),
    }
    other = tmp_path / "other"
    shutil.copytree(project / "artifacts" / "tiny" / "export" / "eagle3", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    small = make_tiny_target(tmp_path / "small", vocab_size=290)
    tree = {"total_token": 600, "depth": 3, "tree_top_k": 3}
    cases: dict[str, dict[str, Any]] = {
        r"tree takes the 400 likeliest tokens of a draft that knows \d+": {**tree, "total_token": 8, "tree_top_k": 400},
        r"layout.jsonl line 2 lacks 'turns'": {"prompts": (files["layout"],)},
        r"twice.jsonl line 2 has the id '1' of line 1": {"prompts": (files["twice"],)},
        r"empty.jsonl line 1: 'turns' is empty": {"prompts": (files["empty"],)},
        r"text.jsonl line 1 is a str, expected an object": {"prompts": (files["text"],)},
        r"prompt set long, question 7: prompt of \d+ tokens, 8 new and \d drafted need": {"prompts": (files["long"],)},
        r"--prompts nothing.jsonl: no such file, and params.yaml has heldout, questions": {
            "prompts": ("nothing.jsonl",)
        },
        r"there is a prompt set 'twice' already": {"prompts": (files["twice"], files["twice"])},
        r"a tree of 600 tokens and 8 new ones leave no room for a prompt in the target's context of 512": tree,
        r"a tree needs .*: add --depth and --tree-top-k": {"total_token": 8},
        r"-k asks for a chain and --total-token": {"num_speculative_tokens": 2, "total_token": 8},
        r"drafts for a vocabulary of 32000, the target has 300": {"draft": other},
        r"nowhere holds no config.json: name the folder of an EAGLE-3 draft": {"draft": tmp_path / "nowhere"},
        r"has another vocabulary": {"assistant": str(small)},
        r"questions from 3 up to 3 are none": {"question_begin": 3, "question_end": 3, "num_prompts": None},
        r"num_samples 2 at temperature 0 would repeat one answer": {"num_samples": 2},
        r"top_p 0.5 and top_k 0 change nothing at temperature 0": {"top_p": 0.5},
        r"--gpus-total 3 is no multiple of --gpus-per-model 2": {"gpus_total": 3, "gpus_per_model": 2},
        r"prompt set questions cannot be scored": {"prompts": ("questions",), "accuracy": ("questions",)},
        r"give --target a folder or a source": {"family": None, "prompts": ("questions",)},
        r"unknown family 'tinny'": {"family": "tinny"},
    }
    for number, (message, changes) in enumerate(cases.items()):
        output, options = tmp_path / f"out{number}", {**QUICK, "family": "tiny", **changes}
        options = {name: value for name, value in options.items() if value is not None or name == "family"}
        with pytest.raises(UserError, match=message) as caught:
            bench(output, options.pop("family"), **options)
        assert "\n" not in str(caught.value)
        assert not (output / "job.json").exists(), message


def test_a_folder_of_something_else(project: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty and holds no benchmark \(job.json\): give another folder"):
        bench(tmp_path, resume=True, **QUICK)


def test_options_need_an_output(project: Path) -> None:
    from click.testing import CliRunner

    from specflow.cli import cli

    for words, message in (
        (["tiny", "--temperature", "0"], "--temperature is for a benchmark of its own: add --output DIR"),
        (["tiny", "--resume"], "--resume is for a benchmark of its own"),
        ([], "Missing argument 'FAMILY'"),
    ):
        result = CliRunner().invoke(cli, ["bench", *words], standalone_mode=False)
        assert isinstance(result.exception, UserError) and message in str(result.exception), words
    found = CliRunner().invoke(cli, ["bench", "tiny", "-k", "0"], standalone_mode=False)
    assert "'0' is neither a number above 0 nor auto" in str(found.exception)


def test_the_family_may_have_a_tree(project: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["families"]["tiny"]["bench"]["tree"] = {"branches": [[0], [1], [0, 0]]}
    other = tmp_path / "params.yaml"
    other.write_text(yaml.safe_dump(raw))
    benchmark("tiny", other, tmp_path / "x", QUICK, resume=False)
    benchmark("tiny", other, tmp_path / "y", {**QUICK, "num_speculative_tokens": 2}, resume=False)
    found = [summary_in(tmp_path / name) for name in ("x", "y")]
    assert [summary.tree and summary.tree.model_dump() for summary in found] == [{"branches": [[0], [1], [0, 0]]}, None]
    assert [summary.num_speculative_tokens for summary in found] == [2, 2]


def test_gpus_are_shared_out_to_workers(machine: object, project: Path) -> None:
    assert num_workers({"gpus_total": 4, "gpus_per_model": 2}) == 2
    assert num_workers({"gpus_total": 3}) == 3
    assert num_workers({"gpus_per_model": 2}) == num_workers({}) == 1
    with pytest.raises(UserError, match="4 GPUs, 2 a copy, make 2 workers: leave --workers 3 out"):
        num_workers({"gpus_total": 4, "gpus_per_model": 2, "workers": 3})


def test_no_gpus(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_workers({"workers": 3}) == 3
    with pytest.raises(UserError, match="there is no GPU here: leave --gpus-per-model and --gpus-total out"):
        num_workers({"gpus_total": 2})
