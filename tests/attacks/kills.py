"""`kill -9` at random moments of the stages that resume: what is run again must equal a run that nobody killed.

`python -m tests.attacks.kills --rounds 60` makes a tiny project, runs it once undisturbed, and then kills one of
sample, extract, train_offline, train_online and bench in each round, up to three times, before it lets the stage
finish. Stages run as `specflow STAGE FAMILY` does, in forks of a process that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
import torch
import yaml

from specflow.bench import stage as _bench  # noqa: F401 - imported here, not in every fork
from specflow.extract import stage as _extract  # noqa: F401
from specflow.files import sha256_file, sha256_json
from specflow.sample import stage as _sample  # noqa: F401
from specflow.tracking import record
from specflow.training import stage as _training  # noqa: F401
from tests.bench_project import without_times
from tests.toys import make_conversations_file, make_prompt_set_file, make_tiny_target, tiny_params

ATTACKED = {"sample": "tiny", "extract": "tiny", "train_offline": "tiny", "train_online": "live", "bench": "tiny"}
"""Stage and the family that it is of."""
OUTPUTS = {
    "sample": ["samples"],
    "extract": ["hidden_states.json"],
    "train_offline": ["draft", "plots/training.json", "plots/eval.json"],
    "train_online": ["draft", "plots/training.json", "plots/eval.json"],
    "bench": ["bench", "plots/survival.json", "plots/sweep.json"],
}
PIPELINE = ["fetch", "prepare", "sample", "vocab", "extract", "train_offline", "export", "bench"]


@dataclass
class Base:
    """A project that ran undisturbed: what it made, and how long each stage took."""

    folder: Path
    digests: dict[str, dict[str, str]]
    seconds: dict[str, float]


@dataclass
class Round:
    stage: str
    kills: int = 0
    """Of those that met the stage alive."""
    faults: list[str] = field(default_factory=list)


def start(folder: Path, *arguments: str) -> int:
    """Run a command of `specflow` in a fork, in a session of its own; its process id. Output goes to `folder`/out."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from specflow.cli import main

        sys.argv = ["specflow", *arguments]
        main()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait(pid: int, folder: Path) -> None:
    """Raise RuntimeError with the command's last line unless it succeeds."""
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"exit code {code}: {(folder / 'out').read_text().strip().splitlines()[-1:]}")


def make_base(folder: Path) -> Base:
    raw = tiny_params(folder)
    raw["online"] = ["live"]
    tiny = raw["families"]["tiny"]
    tiny["data"] |= {"train_conversations": 10, "eval_conversations": 4}
    tiny["sample"]["batch_size"] = 2
    tiny["extract"] |= {"shard_bytes": 65536, "batch_tokens": 256}
    tiny["train"] |= {"checkpoints": 6, "batch_tokens": 128}
    tiny["bench"] |= {"prompt_sets": ["questions"], "max_new_tokens": 8, "num_speculative_tokens": 2}
    # nothing that is a time, or is chosen by one
    tiny["bench"] |= {"stock_generate": False, "cost_tokens": [], "prompt_lookup": False, "bounds": False}
    raw["families"]["live"] = tiny
    folder.mkdir(parents=True, exist_ok=True)
    wait(_fork(lambda: _make_inputs(folder)), folder)
    project = folder / "project"
    project.mkdir()
    (project / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    seconds = {}
    for stage in [*PIPELINE, "train_online"]:
        if stage == "train_online":
            for name in ("target.json", "prompts", "samples", "vocab"):
                _copy(project / "artifacts" / "tiny" / name, project / "artifacts" / "live" / name)
        started = time.monotonic()
        wait(start(project, stage, ATTACKED.get(stage, "tiny")), project)
        seconds[stage] = time.monotonic() - started
    return Base(project, {stage: outputs(project, stage) for stage in ATTACKED}, seconds)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if path.is_dir() else shutil.copy)(path, to)


def _make_inputs(folder: Path) -> None:
    make_tiny_target(folder / "target")
    make_conversations_file(folder / "conversations.json", 30)
    make_prompt_set_file(folder / "questions.jsonl", 4)


def _fork(work: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    work()
    os._exit(0)


def outputs(project: Path, stage: str) -> dict[str, str]:
    """Digest of each output file that is there, times left out; of a store its shards' too."""
    base = project / "artifacts" / ATTACKED[stage]
    found = {}
    for name in OUTPUTS[stage]:
        path = base / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(base))] = _digest(file)
    if stage == "extract" and (base / "hidden_states.json").exists():
        manifest = json.loads((base / "hidden_states.json").read_text(encoding="utf-8"))
        shards = base / manifest["folder"]
        found |= {shard["file"]: sha256_file(shards / shard["file"]) for shard in manifest["shards"]}
    return found


def _digest(file: Path) -> str:
    if file.name == "records.jsonl":
        return sha256_json(without_times([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]))
    if file.name == "summary.json":
        overall = json.loads(file.read_text(encoding="utf-8"))["overall"]
        return sha256_json([overall["acceptance_length"], overall["survival"], overall["lossless_rate"]])
    if file.name == "sweep.json":
        return sha256_json([sorted(row) for row in json.loads(file.read_text(encoding="utf-8"))])
    return sha256_file(file)


def attack(base: Base, stage: str, folder: Path, rng: random.Random) -> Round:
    """Kill the stage one to three times, then let it finish."""
    family, done = ATTACKED[stage], Round(stage)
    shutil.copytree(base.folder, folder)
    artifacts, state = folder / "artifacts" / family, folder / ".specflow" / family
    for name in OUTPUTS[stage]:  # as DVC does before it runs a stage
        path = artifacts / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stage == "extract":
        shutil.rmtree(state / "hidden_states")
    for _ in range(rng.randint(1, 3)):
        pid = start(folder, stage, family)
        time.sleep(rng.uniform(0.0, base.seconds[stage]))
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done.kills += 1
        if orphans := _session(pid):
            done.faults.append(f"orphans {orphans}")
        (artifacts / f".export.{platform.node()}-{pid}.tmp").mkdir(exist_ok=True)  # as a kill in `export` leaves it
        half = [name for name, found in outputs(folder, stage).items() if base.digests[stage].get(name) != found]
        if half:
            done.faults.append(f"half written: {half}")
    try:
        wait(start(folder, stage, family), folder)
    except RuntimeError as error:
        done.faults.append(f"the run after it failed: {error}")
        return done
    now = outputs(folder, stage)
    if different := [name for name in {*now, *base.digests[stage]} if now.get(name) != base.digests[stage].get(name)]:
        done.faults.append(f"differs from the undisturbed run: {sorted(different)}")
    if left := [str(path.relative_to(folder)) for path in _left(artifacts, state)]:
        done.faults.append(f"left over: {left}")
    return done


def _session(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _left(artifacts: Path, state: Path) -> list[Path]:
    """Temporaries, and resume state of a stage that is done."""
    temporaries = [path for folder in (artifacts, state) for path in folder.rglob("*.tmp")]
    return [*temporaries, *(path for path in state.glob("*/*/") if path.parent.name != "hidden_states")]


def run(rounds: int, seed: int, folder: Path, say: Callable[[str], None] = click.echo) -> list[Round]:
    """`rounds` attacks, each stage in turn."""
    torch.set_num_threads(1)  # in the forks too; sums depend on the number
    record.stage_run = _unrecorded  # MLflow's record takes longer than a tiny stage, and no stage reads it
    rng, base = random.Random(seed), make_base(folder)
    found = []
    for number in range(rounds):
        stage = list(ATTACKED)[number % len(ATTACKED)]
        place = folder / f"round-{number}"
        found.append(attack(base, stage, place, rng))
        for fault in found[-1].faults:
            say(f"round {number} ({stage}): {fault}")
        if not found[-1].faults:
            shutil.rmtree(place)
    return found


@contextmanager
def _unrecorded(*_: object, **__: object) -> Iterator[record.StageRun]:
    yield record.StageRun(None)


def table(found: list[Round]) -> list[str]:
    kills, rounds = Counter[str](), Counter[str]()
    faults: Counter[str] = Counter()
    for attacked in found:
        rounds[attacked.stage] += 1
        kills[attacked.stage] += attacked.kills
        faults[attacked.stage] += len(attacked.faults)
    rows = [f"| {stage} | {rounds[stage]} | {kills[stage]} | {faults[stage]} |" for stage in ATTACKED]
    total = f"| all | {rounds.total()} | {kills.total()} | {faults.total()} |"
    return ["| stage | rounds | kill -9 | faults |", "|---|---:|---:|---:|", *rows, total]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.rounds, options.seed, Path(scratch))
    click.echo("\n".join(table(found)))
    return int(any(attacked.faults for attacked in found))


if __name__ == "__main__":
    sys.exit(main())
