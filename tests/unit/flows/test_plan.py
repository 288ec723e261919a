"""Which stages a pipeline run works on, and what they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import plan
from flows.graph import StageNode
from specflow.errors import UserError
from tests import ROOT


def node(address: str, *upstream: str) -> StageNode:
    stage, _, family = address.partition("@")
    return StageNode(address, stage, family or None, upstream)


GRAPH = {
    each.address: each
    for each in (
        node("sample@a"),
        node("sample@b"),
        node("bench@a", "sample@a"),
        node("bench@b", "sample@b"),
        node("train_online@b", "sample@b"),
        node("report", "bench@a", "bench@b"),
    )
}


@pytest.mark.parametrize(
    ("families", "stages", "expected"),
    [
        (None, None, list(GRAPH)),
        (["a"], None, ["sample@a", "bench@a", "report"]),
        (None, ["bench"], ["sample@a", "sample@b", "bench@a", "bench@b"]),
        (["a"], ["report"], ["sample@a", "bench@a", "report"]),
        (["a", "b"], ["bench@b"], ["sample@b", "bench@b"]),
        ([], ["sample"], ["sample@a", "sample@b"]),
    ],
)
def test_selection(families: list[str] | None, stages: list[str] | None, expected: list[str]) -> None:
    chosen = plan.select(GRAPH, families, stages)
    assert list(chosen) == expected
    assert {up for each in chosen.values() for up in each.upstream} <= set(expected)


def test_a_family_left_out_is_no_upstream_of_the_report() -> None:
    assert plan.select(GRAPH, ["a"], None)["report"].upstream == ("bench@a",)


@pytest.mark.parametrize(
    ("families", "stages", "message"),
    [
        (["c"], None, "unknown family 'c': dvc.yaml has a, b"),
        (None, ["bnch"], "unknown stage 'bnch': did you mean 'bench'"),
        (["a"], ["train_online"], "no stage 'train_online' in the chosen families"),
    ],
)
def test_mistakes_are_one_line(families: list[str] | None, stages: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.select(GRAPH, families, stages)


def test_a_job_takes_gpus_times_shards_and_on_a_cpu_one_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  sample: {cmd: x, meta: {gpus: 2, shards: 3, timeout_s: 60}}\n"
        "  bench: {cmd: x, meta: {gpus: 1}}\n"
        "  report: {cmd: x}\n",
        encoding="utf-8",
    )
    made = {}
    for has_gpus in (True, False):
        monkeypatch.setattr(plan, "_has_gpus", lambda has_gpus=has_gpus: has_gpus)
        jobs = plan.make_jobs(tmp_path, GRAPH.values(), {"bench@a"}, force=False, flow_run_id="1")
        made[has_gpus] = {address: job.slots for address, job in jobs.items()}
        assert [address for address, job in jobs.items() if job.changed] == ["bench@a"]
        assert (jobs["sample@a"].timeout_s, jobs["bench@a"].timeout_s) == (60.0, None)
    assert (made[True]["sample@b"], made[True]["bench@b"], made[True]["report"]) == (6, 1, 0)
    assert (made[False]["sample@b"], made[False]["bench@b"], made[False]["report"]) == (1, 1, 0)


def test_prefect_yaml_is_what_the_flows_take() -> None:
    """`python -m flows.serve` reads the same file as `prefect deploy --all`."""
    from flows.serve import deployments

    made = {each.flow_name: each for each in deployments(ROOT / "prefect.yaml")}
    assert list(made) == ["pipeline", "sweep", "benchmark", "nightly"]
    assert {each.name for each in made.values()} == {"local"}
    for each in made.values():
        known = each._parameter_openapi_schema.properties
        assert set(each.parameters) <= set(known)
        assert all(known[parameter].get("description") for parameter in known), "no description in the docstring"
        assert each.concurrency_limit == 1
    (schedule,) = made["nightly"].schedules
    assert schedule.active is False and not made["pipeline"].schedules
