"""Resumable state: what its key holds, who may hold it, what is removed and what never is; temporaries left behind."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import specflow
from specflow.files import KEPT_S, atomic_path, remove_leftovers
from specflow.resume import State, code_digest, in_use, versions
from tests import ROOT

PARTS: dict[str, Any] = {"code": "a", "versions": {"torch": "2"}, "target": 1, "inputs": 1, "settings": {"lr": 1}}


def opened(base: Path, **changes: Any) -> State:
    return State(base, "train_offline@tiny", PARTS | changes)


def fill(state: State, text: str = "work") -> Path:
    file = state.folder / "last.pt"
    file.write_text(text)
    return file


def age(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - KEPT_S - 60,) * 2)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package and its dvc.yaml, where they can be edited."""
    shutil.copytree(ROOT / "specflow", tmp_path / "specflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.setattr(specflow, "__file__", str(tmp_path / "specflow" / "__init__.py"))
    return tmp_path / "specflow"


def test_the_code_digest_changes_with_the_stages_own_code_and_no_other(package: Path) -> None:
    root = package.parent
    stages = ("sample", "extract", "train_offline", "bench")
    before = {stage: code_digest(root, stage) for stage in stages}
    assert len(set(before.values())) == 4

    def changed(file: str) -> set[str]:
        path = package / file
        text = path.read_text()
        path.write_text(text + "# edited\n")
        found = {stage for stage in stages if code_digest(root, stage) != before[stage]}
        path.write_text(text)
        return found

    assert changed("training/losses.py") == {"train_offline"}
    assert changed("extract/capture.py") == {"extract", "train_offline"}
    assert changed("targets/model.py") == set(stages)
    assert changed("report/stage.py") == set()
    assert changed("bench/scoring/accuracy.py") == {"bench"}
    renamed = package / "decoding" / "chain.py"
    renamed.rename(renamed.with_name("chains.py"))
    assert code_digest(root, "bench") != before["bench"]


def test_outside_a_project_the_list_beside_the_package_or_the_whole_package_counts(package: Path) -> None:
    root = package.parent
    inside, elsewhere = code_digest(root, "bench"), root / "elsewhere"
    assert code_digest(elsewhere, "bench") == inside
    (root / "dvc.yaml").unlink()
    whole = code_digest(elsewhere, "bench")
    assert whole != inside and code_digest(root, "tune") == whole
    with (package / "report" / "stage.py").open("a") as file:
        file.write("# edited\n")
    assert code_digest(elsewhere, "bench") != whole


def test_versions_have_no_local_part() -> None:
    found = versions("pyyaml")
    assert set(found) == {"torch", "transformers", "pyyaml"} and not any("+" in version for version in found.values())


def test_runs_of_one_family_never_touch_each_other(tmp_path: Path) -> None:
    """The audit's two checkpoints, alternating: each goes on with its own, while both live and after a kill."""
    a, b = opened(tmp_path), opened(tmp_path, settings={"lr": 2})
    fill(a, "a, step 100")
    fill(b, "b, step 7")
    a.close()
    again = opened(tmp_path)
    assert (again.folder / "last.pt").read_text() == "a, step 100"
    again.finish()
    assert not again.folder.exists() and (b.folder / "last.pt").read_text() == "b, step 7"
    b.close()
    with opened(tmp_path, settings={"lr": 2}) as resumed:
        assert (resumed.folder / "last.pt").read_text() == "b, step 7"


@pytest.mark.parametrize("part", ["code", "versions", "target", "inputs", "settings"])
def test_a_changed_part_starts_anew_and_is_named(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("specflow"), "propagate", True)
    caplog.set_level(logging.INFO, logger="specflow")
    with opened(tmp_path) as first:
        fill(first)
    with opened(tmp_path):
        assert caplog.messages == []  # goes on
    with opened(tmp_path, **{part: "other"}) as state:
        assert not (state.folder / "last.pt").exists()
    (line,) = set(caplog.messages)  # a Prefect in this process may pass messages on to the same handler
    assert f"train_offline@tiny starts anew: {part} changed since the run that was interrupted" in line
    with opened(tmp_path) as back:
        assert (back.folder / "last.pt").read_text() == "work"  # undone: goes on after all


def test_a_finished_run_takes_with_it_what_older_code_left_and_nothing_else(tmp_path: Path) -> None:
    folders = {}
    for part in ("code", "versions", "settings", "inputs"):
        with opened(tmp_path, **{part: "other"}) as state:
            folders[part] = fill(state)
    with opened(tmp_path, code="in use") as live, opened(tmp_path) as state:
        fill(live)
        state.finish()
        assert live.folder.exists()
    assert {part for part, file in folders.items() if file.exists()} == {"settings", "inputs"}


def test_a_complete_store_goes_only_when_newer_code_has_made_it_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store)
        store.finish(keep=True)
    age(store.folder)
    with opened(tmp_path, settings="other") as other:
        fill(other)
        other.finish(keep=True)
    with opened(tmp_path, code="b") as new:
        fill(new)
        assert store.folder.exists()  # until the new one is whole
        with in_use(store.folder):
            new.finish(keep=True)
            assert store.folder.exists()  # a training reads it
    with opened(tmp_path, code="b") as new:
        new.finish(keep=True)
    assert not store.folder.exists() and other.folder.exists() and new.folder.exists()
    assert sorted({path.name.partition(".")[0] for path in tmp_path.iterdir()}) == sorted([other.key, new.key])


def test_what_nobody_goes_on_with_is_removed_by_age_unless_it_is_held(tmp_path: Path) -> None:
    old, held, young = (opened(tmp_path, settings=name) for name in ("old", "held", "young"))
    for state in (old, held, young):
        fill(state)
    old.close()
    young.close()
    age(old.folder)
    age(held.folder)
    with opened(tmp_path):
        assert not old.folder.exists() and held.folder.exists() and young.folder.exists()
    held.close()


HOLD = """
import sys, time
from pathlib import Path
from specflow.resume import State
state = State(Path(sys.argv[1]), "train_offline@tiny", {"code": "a"})
(state.folder / "last.pt").write_text("work")
print("held", flush=True)
time.sleep(60)
"""
WAIT = """
import logging, sys
from pathlib import Path
from specflow.resume import State
logging.basicConfig(level=logging.INFO, format="%(message)s")
with State(Path(sys.argv[1]), "train_offline@tiny", {"code": "a"}) as state:
    print((state.folder / "last.pt").read_text(), flush=True)
"""


def test_one_writer_at_a_time_and_a_killed_one_makes_way(tmp_path: Path) -> None:
    def start(code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start(HOLD) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with start(WAIT) as waiting:  # only now: of two started together either may be first
            try:
                assert waiting.stderr is not None
                who = f"process {holder.pid} on {platform.node()}"
                assert waiting.stderr.readline() == f"train_offline@tiny waits: {who} is at the same run\n"
                assert waiting.poll() is None
            finally:
                holder.send_signal(signal.SIGKILL)
            assert waiting.communicate(timeout=30)[0] == "work\n"


def test_shares_write_side_by_side_and_keep_the_stage_out(tmp_path: Path) -> None:
    from specflow.locks import Lock

    shares = [State(tmp_path, "sample@tiny", PARTS, part=f"share-{index}") for index in range(2)]
    assert shares[0].folder == shares[1].folder
    assert Lock.take(tmp_path / f"{shares[0].key}.lock") is None
    assert Lock.take(tmp_path / f"{shares[0].key}.share-0.lock") is None
    for share in shares:
        share.close()
    with State(tmp_path, "sample@tiny", PARTS) as whole:
        assert whole.folder == shares[0].folder


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    node, dead = platform.node(), int(done.stdout)
    inside = tmp_path / "export"
    inside.mkdir()
    left = [inside / f".eagle3.{node}-{dead}.tmp", tmp_path / f".target.json.{node}-{dead}.tmp"]
    left[0].mkdir()
    (left[0] / "model.safetensors").write_text("half")
    left[1].write_text("half")
    elsewhere = tmp_path / f".draft.other-node.example-{dead}.tmp"
    elsewhere.write_text("half")
    kept = tmp_path / ".gitignore"
    kept.write_text("*.tmp")
    reused = tmp_path / f".metrics.json.{node}-{os.getpid()}.tmp"
    reused.write_text("half")
    os.utime(reused, (1, 1))  # before this process was born
    with atomic_path(tmp_path / "vocab") as mine:
        mine.mkdir()
        remove_leftovers(tmp_path)
        assert mine.is_dir()
    assert not any(path.exists() for path in [*left, reused])
    assert elsewhere.exists() and kept.exists() and (tmp_path / "vocab").is_dir()
    os.utime(elsewhere, (time.time() - KEPT_S - 60,) * 2)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "export", "vocab"]
