"""What the flows cost: a run with nothing to do, a stage more than plain `dvc repro -s`, and a killed holder of a slot.

Run with: python benchmarks/orchestration.py
It starts a Prefect server of its own on loopback and makes toy projects in a temporary folder.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.integration.flow_server import FlowRun, Server, make_toy, wait_for  # noqa: E402
from tests.toys import tiny_params  # noqa: E402

FAMILIES = ("a", "b")
CHAIN = ("fetch", "prepare", "sample", "vocab", "extract", "train_offline", "export", "bench")
REPEATS = 3


def main() -> None:
    print(
        f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "prefect").mkdir()
        server = Server(folder / "prefect")
        try:
            server.set_limit(2)
            project = make_pipeline(folder / "pipeline")
            server.pipeline(project)
            no_op = min(flow_seconds(server, server.pipeline(project)) for _ in range(REPEATS))
            print(f"no-op pipeline of 2 families, 17 stages, MLflow record included: {no_op:.1f} s of flow time (<= 6)")
            overhead(server, project)
            server.set_limit(1)
            killed_holder(server, folder / "killed")
        finally:
            server.stop()


def make_pipeline(folder: Path) -> Path:
    """The shape of dvc.yaml with two families, each stage one trivial process; the parameters are real ones."""
    stages = {}
    before = "in.txt"
    for stage in CHAIN:
        out = f"artifacts/${{item.family}}/{stage}.txt"
        stages[stage] = {
            "matrix": {"family": list(FAMILIES)},
            "cmd": f"mkdir -p artifacts/${{item.family}} && cat {before} > {out}",
            "deps": [before],
            "outs": [out],
            "meta": {"gpus": int(stage in ("sample", "extract", "train_offline", "bench"))},
        }
        before = out
    report = {"cmd": "date > report.txt", "deps": ["artifacts"], "outs": ["report.txt"]}
    make_toy(folder, yaml.safe_dump({"stages": {**stages, "report": report}}), **{"in": "1"})
    params = tiny_params(folder)
    params["families"] = dict.fromkeys(FAMILIES, params["families"]["tiny"])
    params["offline"] = list(FAMILIES)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return folder


def flow_seconds(server: Server, run: FlowRun) -> float:
    found = server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run.id]}}})[0]
    return float(found["total_run_time"])


def overhead(server: Server, project: Path) -> None:
    """The chain of one family, forced: by the flow, and by `dvc repro -s` one stage after the other."""
    by_flow, by_hand = [], []
    for _ in range(REPEATS):
        by_flow.append(flow_seconds(server, server.pipeline(project, families=["a"], force=True)))
        started = time.perf_counter()
        for address in [*(f"{stage}@a" for stage in CHAIN), "report"]:
            command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-f", "-s", address]
            subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
        by_hand.append(time.perf_counter() - started)
    stages = len(CHAIN) + 1
    more = (min(by_flow) - min(by_hand)) / stages
    print(f"forced chain of {stages} stages: flow {min(by_flow):.1f} s, `dvc repro -f -s` {min(by_hand):.1f} s")
    print(f"overhead of a stage over plain `dvc repro -s`: {more:.2f} s (<= 2)")


def killed_holder(server: Server, folder: Path) -> None:
    """Kill -9 a flow whose stage holds the only slot; how long until the next flow's stage runs."""
    code = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(600)"
    stage = {"cmd": f'{sys.executable} -c "{code}"', "outs": ["never.txt"], "meta": {"gpus": 1}}
    toy = make_toy(folder, yaml.safe_dump({"stages": {"sample": stage}}))
    first = server.start_pipeline(toy)
    wait_for((toy / "started").exists, 120, "the stage starts")
    (toy / "started").unlink()
    first.kill()
    killed = time.perf_counter()
    first.wait()
    second = server.start_pipeline(toy)
    wait_for((toy / "started").exists, 180, "the next flow's stage starts")
    print(f"from kill -9 of a holder to the next flow's stage, start-up included: {time.perf_counter() - killed:.1f} s")
    os.kill(second.pid, signal.SIGTERM)
    second.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
