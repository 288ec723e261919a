"""The flows against a real Prefect server and worker, mostly on toy DVC projects whose commands are trivial."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow.tracking import store
from tests.integration.flow_server import Server, dvc, make_toy, running, wait_for
from tests.projects import make_project
from tests.toys import tiny_params

TWO_FAMILIES = """
stages:
  train:
    matrix: {family: [x, y]}
    cmd: cp in_${item.family}.txt ${item.family}.train
    deps: ["in_${item.family}.txt"]
    meta: {gpus: 1, timeout_s: 60}
    outs: ["${item.family}.train"]
  bench:
    matrix: {family: [x, y]}
    cmd: wc -c < ${item.family}.train > ${item.family}.bench
    deps: ["${item.family}.train"]
    meta: {gpus: 1, timeout_s: 60}
    outs: ["${item.family}.bench"]
  report:
    cmd: cat x.bench y.bench > report.txt
    deps: [x.bench, y.bench]
    outs: [report.txt]
"""
X, Y = ["train@x", "bench@x"], ["train@y", "bench@y"]
SLEEPER = (
    "import os, pathlib, time; pathlib.Path('sleeper.pid').write_text(str(os.getpid())); "
    "pathlib.Path('started').touch(); time.sleep(300)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("prefect"))
    try:
        made.set_limit(1)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def toy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families that have run once; the tests that use it put back what they change."""
    folder = make_toy(tmp_path_factory.mktemp("toy"), TWO_FAMILIES, in_x="1", in_y="2")
    twin = tmp_path_factory.mktemp("twin") / "twin"
    shutil.copytree(folder, twin)
    run = server.pipeline(folder)
    assert run.type == "COMPLETED" and run.names == dict.fromkeys([*X, *Y, "report"], "Completed")
    dvc(twin, "repro", "--quiet")
    assert lock(folder) == lock(twin)  # DVC writes its entries in the order in which stages ended
    assert server.artifacts(run.id)["stages"].count('"ran"') == 5
    return folder


def lock(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"])


def sleeper_alive(folder: Path) -> bool:
    return (Path("/proc") / (folder / "sleeper.pid").read_text(encoding="utf-8")).exists()


def test_dvc_and_the_flow_agree_on_what_is_stale(server: Server, toy: Path) -> None:
    """Nothing stale; one family's input changed; changed back; the other family alone; a stage by its name."""
    assert "up to date" in dvc(toy, "status")
    (toy / "in_x.txt").write_text("many more", encoding="utf-8")
    nothing_of_x, changed = server.flows(toy, ("pipeline", {"families": ["y"]}), ("pipeline", {}))
    assert nothing_of_x.names == dict.fromkeys([*Y, "report"], "Cached")
    assert changed.names == {**dict.fromkeys([*X, "report"], "Completed"), **dict.fromkeys(Y, "Cached")}
    assert (toy / "report.txt").read_text().split() == ["9", "1"]
    (toy / "in_x.txt").write_text("1", encoding="utf-8")
    back, again = server.flows(toy, ("pipeline", {"stages": ["bench"]}), ("pipeline", {}))
    assert back.names == {**dict.fromkeys(X, "Restored"), **dict.fromkeys(Y, "Cached")}
    assert again.names == {**dict.fromkeys([*X, *Y], "Cached"), "report": "Restored"}
    assert "up to date" in dvc(toy, "status")


def test_an_upstream_that_comes_out_the_same_leaves_the_rest_cached(server: Server, toy: Path) -> None:
    """`train@x` has another command and the same output, so `bench@x` is looked at again and left alone."""
    text = (toy / "dvc.yaml").read_text(encoding="utf-8")
    (toy / "dvc.yaml").write_text(text.replace("cmd: cp in", "cmd: cat /dev/null && cp in"), encoding="utf-8")
    run = server.pipeline(toy, families=["x"])
    (toy / "dvc.yaml").write_text(text, encoding="utf-8")
    assert run.names == {"train@x": "Completed", "bench@x": "Cached", "report": "Cached"}
    assert server.pipeline(toy, stages=["train@x"]).type == "COMPLETED"


def test_mistakes_fail_early_in_one_line(server: Server, toy: Path) -> None:
    family, stage = server.flows(toy, ("pipeline", {"families": ["z"]}), ("pipeline", {"stages": ["bnch"]}))
    assert (family.type, family.message, family.stages) == ("FAILED", "unknown family 'z': dvc.yaml has x, y", {})
    assert (stage.type, stage.stages) == ("FAILED", {}) and "did you mean 'bench'?" in stage.message
    server.set_limit(None)
    try:
        missing = server.pipeline(toy, force=True)
    finally:
        server.set_limit(1)
    said = "no global concurrency limit 'gpu' on this Prefect server: run `specflow init`"
    assert (missing.type, missing.message, missing.stages) == ("FAILED", said, {})
    code = "from flows import slots; slots.check_limit({'bench@x': 3})"
    done = subprocess.run([sys.executable, "-c", code], env=server.environment, capture_output=True, text=True)
    assert "bench@x asks for 3 GPUs (gpus times shards) and the limit 'gpu' has 1" in done.stderr.splitlines()[-1]


def test_retries_failures_and_the_other_family(server: Server, tmp_path: Path) -> None:
    """x loses its server once and is tried again; y is a user's mistake, tried once; z does not mind either."""
    toy = make_toy(
        tmp_path / "toy",
        """
stages:
  bench:
    matrix: {family: [x, y, z]}
    cmd: python stage.py ${item.family}
    deps: [in.txt]
    outs: ["${item.family}.bench"]
  after:
    matrix: {family: [x, y, z]}
    cmd: cp ${item.family}.bench ${item.family}.after
    deps: ["${item.family}.bench"]
    outs: ["${item.family}.after"]
  report:
    cmd: cat x.after y.after > report.txt
    deps: [x.after, y.after]
    outs: [report.txt]
""",
        **{"in": "1"},
    )
    (toy / "stage.py").write_text(
        "import pathlib, sys\n"
        "family, seen = sys.argv[1], pathlib.Path('seen')\n"
        "if family == 'x' and not seen.exists():\n"
        "    seen.touch(); print('specflow: the server went away', file=sys.stderr); sys.exit(75)\n"
        "if family == 'y':\n"
        "    print('specflow: mend line 3', file=sys.stderr); sys.exit(2)\n"
        "pathlib.Path(family + '.bench').write_text(family)\n",
        encoding="utf-8",
    )
    run = server.pipeline(toy, retry_delays_s=[0.2, 0.2])
    assert run.type == "FAILED" and "specflow: mend line 3" in run.message and "4 ran" in run.message
    assert run.names == {
        **dict.fromkeys(["bench@x", "after@x", "bench@z", "after@z"], "Completed"),
        "bench@y": "Failed",
        "after@y": "Skipped",
        "report": "Skipped",
    }
    said = run.stages["bench@y"][1]
    assert said.startswith("bench@y failed after") and said.endswith(" s: specflow: mend line 3")
    assert (run.tries["bench@x"], run.tries["bench@y"]) == (2, 1)
    table = json.loads(server.artifacts(run.id)["stages"])
    assert {row["stage"]: row["state"] for row in table}["after@y"] == "skipped"


def test_a_timeout_leaves_no_process(server: Server, tmp_path: Path) -> None:
    toy = make_toy(
        tmp_path / "toy",
        f'stages:\n  sample:\n    cmd: python -c "{SLEEPER}"\n    meta: {{timeout_s: 5}}\n    outs: [never.txt]\n',
    )
    run = server.pipeline(toy)
    name, message = run.stages["sample"]
    assert name == "TimedOut" and "longer than its limit of 5 s" in message
    assert not sleeper_alive(toy)


def test_a_cancelled_flow_ends_its_stage_and_starts_no_other(server: Server, tmp_path: Path) -> None:
    """Prefect cancels by SIGTERM to the flow's process."""
    toy = sleeping_toy(tmp_path)
    with running(server.start_pipeline(toy)) as flow:
        wait_for((toy / "started").exists, 90.0, "the stage starts")
        os.kill(flow.pid, signal.SIGTERM)
        flow.wait(30)
    assert not sleeper_alive(toy)
    assert not (toy / "next.txt").exists() and "Running stage 'next'" not in (toy / "flow.log").read_text()
    assert dvc(toy, "status", "--json")  # no lock is left behind


def sleeping_toy(folder: Path) -> Path:
    return make_toy(
        folder / "toy",
        f"""
stages:
  sample:
    cmd: python -c "{SLEEPER}"
    meta: {{gpus: 1}}
    outs: [never.txt]
  next:
    cmd: touch next.txt
    deps: [never.txt]
    outs: [next.txt]
""",
    )


def test_kill_9_of_a_flow_frees_process_checkout_and_slot(server: Server, tmp_path: Path) -> None:
    """The next flow's stage starts within a minute (issue 3); the server alone would take up to 115 s."""
    toy = sleeping_toy(tmp_path)
    with running(server.start_pipeline(toy)) as flow:
        wait_for((toy / "started").exists, 90.0, "the stage starts")
        flow.kill()
        flow.wait()
        killed = time.monotonic()
    wait_for(lambda: not sleeper_alive(toy), 30.0, "the stage of the killed flow ends")
    (toy / "started").unlink()
    with running(server.start_pipeline(toy)) as flow:
        wait_for((toy / "started").exists, 60.0, "the next flow's stage starts")
        assert time.monotonic() - killed < 60.0
        os.kill(flow.pid, signal.SIGTERM)
        flow.wait(30)
    assert not sleeper_alive(toy)


@pytest.mark.parametrize("slots", [1, 2])
def test_families_share_the_slots(server: Server, tmp_path: Path, slots: int) -> None:
    """With two slots each stage waits for the other's start, so both must run at once; with one they may not."""
    toy = make_toy(
        tmp_path / "toy",
        """
stages:
  bench:
    matrix: {family: [x, y]}
    cmd: python stage.py ${item.family}
    meta: {gpus: 1}
    outs: ["${item.family}.out"]
""",
    )
    (toy / "stage.py").write_text(
        "import pathlib, sys, time\n"
        "me, other = sys.argv[1], {'x': 'y', 'y': 'x'}[sys.argv[1]]\n"
        "began, over = (pathlib.Path(f'{name}.{word}') for name, word in ((other, 'began'), (other, 'over')))\n"
        "was_over = over.exists()\n"
        "pathlib.Path(me + '.began').touch()\n"
        f"deadline = time.monotonic() + {[1.5, 60][slots - 1]}\n"
        "while not began.exists() and time.monotonic() < deadline: time.sleep(0.05)\n"
        "pathlib.Path(me + '.out').write_text('together' if began.exists() and not was_over else 'alone')\n"
        "pathlib.Path(me + '.over').touch()\n",
        encoding="utf-8",
    )
    server.set_limit(slots)
    try:
        run = server.pipeline(toy)
    finally:
        server.set_limit(1)
    assert run.type == "COMPLETED"
    met = {(toy / f"{family}.out").read_text() for family in "xy"}
    assert met == ({"alone"} if slots == 1 else {"together"})
    assert set(lock(toy)) == {"bench@x", "bench@y"}


def test_a_slow_commit_does_not_lose_another_stages_work(server: Server, tmp_path: Path) -> None:
    """DVC holds its lock while it hashes; a stage that ends meanwhile must wait for it, for longer than DVC's 3 s."""
    toy = make_toy(
        tmp_path / "toy",
        """
stages:
  big: {cmd: touch big.out, outs: [big.out]}
  quick: {cmd: python wait.py, outs: [quick.out]}
""",
    )
    (toy / "wait.py").write_text(
        "import pathlib, time\n"
        "while not pathlib.Path('committing').exists(): time.sleep(0.05)\n"
        "pathlib.Path('quick.out').write_text('1')\n",
        encoding="utf-8",
    )
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.orig_argv[-1] == 'big' and 'repro' in sys.orig_argv:\n"
        "    import pathlib, time\n"
        "    from dvc.stage import Stage\n"
        "    commit = Stage.commit\n"
        "    def slow(self, *args, **kwargs):\n"
        "        pathlib.Path('committing').touch(); time.sleep(8); return commit(self, *args, **kwargs)\n"
        "    Stage.commit = slow\n",
        encoding="utf-8",
    )
    before = server.environment["PYTHONPATH"]
    server.environment["PYTHONPATH"] = f"{slow}{os.pathsep}{before}"
    try:
        run = server.pipeline(toy)
    finally:
        server.environment["PYTHONPATH"] = before
    assert run.names == {"big": "Completed", "quick": "Completed"}
    assert set(lock(toy)) == {"big", "quick"}
    assert "up to date" in dvc(toy, "status")


def test_a_sweep_keeps_what_works_and_leaves_the_workspace(server: Server, tmp_path: Path) -> None:
    toy = tmp_path / "toy"
    toy.mkdir()
    params = tiny_params(toy)
    (toy / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (toy / "dvc.yaml").write_text(
        """
stages:
  bench:
    matrix: {family: ["tiny"]}
    cmd: python stage.py
    deps: [stage.py]
    params: [families.tiny.bench]
    metrics:
      - artifacts/tiny/metrics/bench.json: {cache: false}
""",
        encoding="utf-8",
    )
    (toy / "stage.py").write_text(
        "import json, pathlib, sys, yaml\n"
        "k = yaml.safe_load(open('params.yaml'))['families']['tiny']['bench']['num_speculative_tokens']\n"
        "if k == 3: sys.exit('specflow: three is too many')\n"
        "folder = pathlib.Path('artifacts/tiny/metrics'); folder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'bench.json').write_text(json.dumps({'tok_s': k * 10, 'draft': 'd'}))\n",
        encoding="utf-8",
    )
    (toy / ".gitignore").write_text("/.specflow/\n/*.log\n/mlflow.db*\n", encoding="utf-8")
    for command in (
        ["git", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "x"],
    ):
        subprocess.run(command, cwd=toy, check=True)
    stranger = (  # what a killed `dvc exp run --temp` leaves behind; the next one would run it as its own
        "from dvc.repo import Repo\n"
        "experiments = Repo().experiments\n"
        "params = {'params.yaml': ['++families.tiny.bench.num_speculative_tokens=3']}\n"
        "experiments.queue_one(experiments.tempdir_queue, params=params, targets=['bench'], name='stranger')\n"
    )
    subprocess.run([sys.executable, "-c", stranger], cwd=toy, check=True)
    grid = {"bench.num_speculative_tokens": [2, 3]}
    run, bad = server.flows(
        toy,
        ("sweep", {"family": "tiny", "grid": grid, "name": "k"}),
        ("benchmark", {"family": "tiny", "repeats": 1}),
    )
    assert (run.type, run.message) == ("FAILED", "1 of 2 settings failed; the others are in the table")
    assert run.names == {"k-1": "Completed", "k-2": "Failed"}
    lines = (toy / ".specflow/sweeps/k.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "experiment,bench.num_speculative_tokens,state,bench.tok_s"
    assert lines[1] == "k-1,2,done,20" and lines[2].startswith("k-2,3,") and "three is too many" in lines[2]
    assert [row["bench.tok_s"] for row in json.loads(server.artifacts(run.id)["sweep-k"])] == ["20", ""]
    assert bad.type == "FAILED" and "repeats" in bad.message and bad.stages == {}
    said = [
        subprocess.run(["git", *words], cwd=toy, check=True, capture_output=True, text=True).stdout
        for words in (["status", "--porcelain"], ["reflog", "refs/exps/stash"], ["for-each-ref", "refs/exps/temp"])
    ]
    assert said[0] == "" and said[1].count("\n") == 1 and "stranger" in said[1] and said[2] == ""


def test_documented_path_with_a_worker(server: Server, tmp_path: Path) -> None:
    """init, deploy --all, worker, deployment run --watch, on the tiny project; then cancelling a run by its worker."""
    folder = tmp_path / "project"
    folder.mkdir()
    prefect = {key: value for key, value in server.environment.items() if key.startswith("PREFECT")}
    project = make_project(folder, tiny_params(folder))
    project.environment |= prefect
    server.set_limit(None)
    assert f"Prefect: {server.api}, work pool 'specflow', limit 'gpu' of 1" in project.run("specflow", "init")
    assert "work pool 'specflow'" in project.run(sys.executable, "-m", "flows.setup")  # safe to repeat
    project.run("prefect", "--no-prompt", "deploy", "--all")
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "specflow"]
    with running(server.start(worker, tmp_path, tmp_path / "worker.log")):
        run_it = ["prefect", "deployment", "run", "pipeline/local", "--param"]
        project.run(*run_it, 'families=["tiny"]', "--param", 'stages=["prepare"]', "--watch")
        run = newest_run(server)
        assert run.names == dict.fromkeys(("inputs@tiny", "fetch@tiny", "prepare@tiny"), "Completed")
        assert "up to date" in project.run("dvc", "status", "fetch@tiny", "prepare@tiny")
        parent = mlflow_parent(folder)
        assert parent.data.tags["prefect_flow_run_id"] == run.id and parent.info.status == "FINISHED"
        assert parent.info.run_id in server.artifacts(run.id)["links"]

        project.set("families", "tiny", "data", "seed", value=1)
        stage = folder / "specflow" / "data" / "prepare.py"
        stage.write_text("import time\nfrom pathlib import Path\nPath('started').touch()\ntime.sleep(300)\n")
        project.run(*run_it, 'stages=["prepare"]')
        wait_for((folder / "started").exists, 120.0, "the stage starts")
        cancelled = newest_run(server, wait=False)
        project.run("prefect", "flow-run", "cancel", cancelled.id)
        wait_for(lambda: flow_state(server, cancelled.id) == "CANCELLED", 90.0, "the run is cancelled")
        assert not [line for line in processes() if "specflow prepare" in line and str(folder) in line]


def newest_run(server: Server, *, wait: bool = True) -> Any:
    found = server.post("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
    return server.read(found["id"], found["state_type"], "", wait=wait)


def flow_state(server: Server, flow_run_id: str) -> str:
    found = server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})[0]
    return str(found["state_type"])


def mlflow_parent(folder: Path) -> Any:
    client = store.open_store(folder)
    experiment = client.get_experiment_by_name("tiny")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.prefect_flow_run_id LIKE '%'")
    return parent


def processes() -> list[str]:
    """Command and folder of every process, one line each."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text().replace("\0", " ")
            found.append(f"{command} in {(entry / 'cwd').readlink()}")
    return found
