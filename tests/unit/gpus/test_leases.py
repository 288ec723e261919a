"""Real processes with fake devices: first come first served, nothing lost by a kill. See attacks/leases.py too."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specflow.errors import UserError
from specflow.gpus import leases, nvml, queue
from specflow.gpus.resources import Resources
from specflow.gpus.status import status
from tests.fake_nvml import GB, Machine, gpu, wait_for


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed at the end."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def holders(log: Path) -> list[str]:
    """Who got devices, in the order in which they got them."""
    held = [event for event in events(log) if event["event"] == "hold"]
    return [event["holder"] for event in sorted(held, key=lambda event: event["granted_s"])]


def waiting() -> list[str]:
    return [request.holder for request in queue.requests_now() if request.granted_s is None]


def needs(gpus: int, memory_gb: float | None = None) -> Resources:
    return Resources(gpus, memory_gb, declared=True)


def test_two_are_not_starved_by_ones(machine: Machine, log: Path, started: list[subprocess.Popen[str]]) -> None:
    machine.set([gpu(0), gpu(1)])
    go = log.with_name("go")
    started.append(machine.start("one@a", 1, go, log))
    wait_for(lambda: len(holders(log)) == 1)
    started.append(machine.start("two@b", 2, 0.1, log))
    wait_for(lambda: waiting() == ["two@b"])
    started.append(machine.start("one@c", 1, 0, log))  # GPU 1 is free, but two@b came first
    wait_for(lambda: waiting() == ["two@b", "one@c"])
    go.touch()
    for process in started:
        assert process.wait(20) == 0
    assert holders(log) == ["one@a", "two@b", "one@c"]


def test_other_visible_devices_do_not_wait(machine: Machine, log: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(machine.start("one@a", 1, 60, log, CUDA_VISIBLE_DEVICES="0,1"))
    wait_for(lambda: holders(log) == ["one@a"])
    started.append(machine.start("two@b", 2, 0, log, CUDA_VISIBLE_DEVICES="1,0"))
    wait_for(lambda: waiting() == ["two@b"])
    started.append(machine.start("two@c", 2, 0, log, CUDA_VISIBLE_DEVICES="3,2"))
    assert started[-1].wait(20) == 0
    assert events(log)[-1]["visible"] == "3,2"
    # Of a wider set, what the earlier request does not want may be taken.
    started.append(machine.start("one@d", 1, 0, log))
    assert started[-1].wait(20) == 0
    assert events(log)[-1]["visible"] == "2" and waiting() == ["two@b"]


def test_a_killed_holder_frees_at_once(machine: Machine, log: Path, started: list[subprocess.Popen[str]]) -> None:
    machine.set([gpu(0)])
    first = machine.start("train_offline@a", "1", "fork", log)
    started.append(first)
    wait_for(lambda: holders(log) == ["train_offline@a"])
    child = events(log)[0]["child"]
    started.append(machine.start("sample@b", 1, 0, log))
    wait_for(lambda: waiting() == ["sample@b"])
    try:
        first.kill()
        killed_s = time.time()
        assert started[-1].wait(20) == 0
        os.kill(child, 0)  # a forked child of the holder still lives, without keeping the lock
    finally:
        os.kill(child, signal.SIGKILL)
    granted_s = events(log)[-1]["granted_s"]
    assert granted_s - killed_s < 5
    said = started[-1].stdout.read()
    assert f"sample@b waits for 1 GPU: GPU 0 held by train_offline@a (pid {first.pid}, " in said
    assert said.count("waits") == 1 and "sample@b runs on GPU 0 (Fake H100)" in said


def test_a_child_that_outlives_its_parents_lease_keeps_the_device(
    machine: Machine, log: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Also where NVML does not see it yet: the kill frees the parent's lock, and the child believes in the lease."""
    machine.set([gpu(0)])
    started.append(machine.start("train_offline@a", 1, "nest", log))
    wait_for(lambda: len(events(log)) == 2)
    child = next(event["child"] for event in events(log) if event["event"] == "hold")
    place = queue.folder()
    ticket = queue.ask(place, holder="sample@b", gpus=1, candidates=[gpu(0)["uuid"]], token="t")
    try:
        held = status_of(0)
        assert held["holder"] == "train_offline@a", "the lease's holder is shown, not its child"
        started[0].kill()
        started[0].wait()
        assert queue.attempt(place, ticket, lambda uuid: None).devices is None
        assert (status_of(0)["holder"], status_of(0)["pid"]) == ("bench@child", child)
    finally:
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: queue.attempt(place, ticket, lambda uuid: None).devices is not None)
    ticket.release()


def status_of(device: int) -> dict[str, Any]:
    return status()["gpus"][device]["lease"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_waiter_leaves_the_queue(
    machine: Machine, log: Path, started: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    with leases.lease(needs(4), "bench@a"):
        started.append(machine.start("two@b", 2, 0, log))
        wait_for(lambda: waiting() == ["two@b"])
        started[0].send_signal(number)
        assert started[0].wait(20) != 0
        assert waiting() == []


def test_a_forked_child_holds_nothing(machine: Machine) -> None:
    with leases.lease(needs(1), "sample@a"):
        before = queue.requests_now()
        child = os.fork()
        if child == 0:
            try:
                for lock in list(queue.Lock._open):
                    lock.close()
                os._exit(len(queue.Lock._open))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert queue.requests_now() == before != []


def test_foreign_processes(machine: Machine, log: Path, started: list[subprocess.Popen[str]]) -> None:
    other = os.getppid()  # a process that lives and is no child of ours
    taken = gpu(0, used=70 * GB, processes=[[other, 70 * GB]])
    machine.set([taken, gpu(1)])
    with leases.lease(needs(1), "sample@a") as lease:
        assert [device.index for device in lease.devices] == [1]
    with leases.lease(needs(1, 9.5), "sample@a") as lease:  # asked for memory, it shares
        assert [device.index for device in lease.devices] == [0]
        assert len(lease.strangers()) == 1 and f"pid {other} (" in lease.strangers()[0]
    machine.set([taken])
    waiter = machine.start("sample@b", 1, 0, log)
    started.append(waiter)
    wait_for(lambda: waiting() == ["sample@b"])
    machine.set([gpu(0)])
    assert waiter.wait(20) == 0
    said = waiter.stdout.read()
    assert "waits for 1 GPU: GPU 0 in use by pid" in said and "70.0 GB), not by specflow" in said


def test_a_request_that_foreign_processes_block_lets_others_pass(
    machine: Machine, log: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set([gpu(0), gpu(1, used=70 * GB)])
    big = machine.start("two@a", 2, 0, log)
    started.append(big)
    wait_for(lambda: waiting() == ["two@a"])
    started.append(machine.start("one@b", 1, 0, log))
    assert started[-1].wait(queue.ASIDE_SECONDS + 20) == 0
    assert holders(log) == ["one@b"] and queue.requests_now()[0].aside
    machine.set([gpu(0), gpu(1)])
    assert big.wait(20) == 0


def test_requests_that_can_never_be_served(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(resources: Resources, *, allow_cpu: bool = False) -> str:
        with (
            pytest.raises(UserError) as caught,
            leases.lease(resources, "sample@tiny", allow_cpu=allow_cpu),
        ):
            pass
        return str(caught.value)

    machine.set([gpu(0), gpu(1), gpu(2, memory=24 * GB)])
    assert "needs 4 GPUs, but 3 of the visible devices can serve: 0 (Fake H100, 80.0 GB), 1 (" in refused(needs(4))
    assert "needs 3 GPUs with 40 GB free, but 2 of" in refused(needs(3, 40), allow_cpu=True)
    assert "needs 1 GPU with 81 GB free, but 0 of" in refused(needs(1, 81))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert "needs 2 GPUs, but 1 of" in refused(needs(2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    none = refused(needs(1))
    assert "sample@tiny needs 1 GPU and there is none (CUDA_VISIBLE_DEVICES='' hides all 3)" in none
    assert "families.tiny.allow_cpu: true" in none
    assert queue.requests_now() == []


def test_what_the_block_sees(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    before = dict(os.environ)
    with leases.lease(needs(1), "sample@a") as lease:
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("3", "PCI_BUS_ID")
        assert [device.index for device in lease.devices] == [3]
    assert dict(os.environ) == before
    with leases.lease(Resources(0, declared=True), "vocab@a") as lease:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and lease.cost() == {}
    with leases.lease(Resources(), "sample@a") as lease:  # no dvc.yaml here: nothing leased, nothing hidden
        assert dict(os.environ) == before and lease.devices == ()
    with pytest.raises(ZeroDivisionError), leases.lease(needs(2), "sample@a"):
        raise ZeroDivisionError
    assert dict(os.environ) == before and queue.requests_now() == []


def test_a_child_uses_its_parents_lease(machine: Machine, log: Path, started: list[subprocess.Popen[str]]) -> None:
    def child(count: int) -> subprocess.Popen[str]:
        inherited = {key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES", "SPECFLOW_LEASE")}
        code = (
            "import os; from specflow.gpus import leases; from specflow.gpus.resources import Resources\n"
            f"with leases.lease(Resources({count}, declared=True), 'sample@child') as lease:\n"
            "    print(lease.root_pid, os.environ['CUDA_VISIBLE_DEVICES'])\n"
        )
        environment = machine.environment(**inherited)
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    with leases.lease(needs(3), "sample@parent"):
        assert child(2).stdout.split() == [str(os.getpid()), "0,1"]
        os.environ["CUDA_VISIBLE_DEVICES"] = "2"  # the parent gives each child one of its own
        assert child(1).stdout.split() == [str(os.getpid()), "2"]
        refused = child(2).stderr
        assert "needs 2 GPUs" in refused
        os.environ["CUDA_VISIBLE_DEVICES"] = "2,3"
        assert f"the lease of sample@parent (pid {os.getpid()}), which has 1 for it" in child(2).stderr
        assert len(queue.requests_now()) == 1
        mark = os.environ["SPECFLOW_LEASE"]
    # The mark of a lease that ended counts for nothing.
    with leases.lease(needs(1), "sample@other"):
        started.append(machine.start("sample@late", 1, 0, log, SPECFLOW_LEASE=mark))
        assert started[-1].wait(20) == 0
    assert events(log)[0]["devices"] == [gpu(1)["uuid"]]


def test_threads_of_one_process_do_not_deadlock(machine: Machine) -> None:
    """A second lease in a process is nested in the first, as a child's is."""
    machine.set([gpu(0)])
    found: list[tuple[int, ...]] = []

    def nested() -> None:
        with leases.lease(needs(1), "sample@b") as lease:
            found.append(tuple(device.index for device in lease.devices))

    with leases.lease(needs(1), "sample@a"):
        thread = threading.Thread(target=nested)
        thread.start()
        thread.join(10)
    assert found == [(0,)]


def test_the_folder_serves_every_user(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0o077)
    try:
        with leases.lease(needs(1), "sample@a"):
            modes = {path.name.split("-")[0]: stat.S_IMODE(path.stat().st_mode) for path in machine.leases.iterdir()}
            assert modes == {"GPU": 0o666, "queue": 0o666, "ticket": 0o644}
    finally:
        os.umask(old)
    assert stat.S_IMODE(machine.leases.stat().st_mode) == 0o1777
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECFLOW_LEASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"GPU leases cannot be kept in .*file.* set SPECFLOW_LEASE_DIR"):
        leases.lease(needs(1), "sample@a").__enter__()


def test_a_lock_is_closed_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception out of close() must not lead to a second one, whose number may be another lock's by then."""
    lock = queue.Lock.take(machine.leases.parent / "x.lock")
    assert lock is not None
    real, closed = os.close, []

    def interrupted(descriptor: int) -> None:
        closed.append(descriptor)
        real(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.close()
    lock.close()
    monkeypatch.undo()
    assert len(closed) == 1


def test_a_device_locked_by_another_program_is_left_alone(machine: Machine) -> None:
    """`flock <folder>/<uuid>.lock command` keeps a device for a command that knows nothing of specflow."""
    place = queue.folder()
    path = place / f"{gpu(0)['uuid']}.lock"
    other = subprocess.Popen(["flock", str(path), "sleep", "60"], start_new_session=True)
    try:
        wait_for(lambda: path.exists() and not lockable(path))
        with leases.lease(needs(1), "sample@a") as lease:
            assert [device.index for device in lease.devices] == [1]
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()


def lockable(path: Path) -> bool:
    lock = queue.Lock.take(path)
    if lock is not None:
        lock.close()
    return lock is not None


def test_a_removed_lock_file_is_not_taken_for_the_device(machine: Machine, tmp_path: Path) -> None:
    """Something that cleans temporary folders between open and lock must not lead to two holders."""
    path = tmp_path / "x.lock"
    first = queue.Lock.take(path)
    assert first is not None and queue.Lock.take(path) is None
    path.unlink()
    second = queue.Lock.take(path)
    assert second is not None and os.fstat(second.descriptor or 0).st_ino == path.stat().st_ino
    first.close()
    assert queue.Lock.take(path) is None
    late: list[queue.Lock | None] = []
    thread = threading.Thread(target=lambda: late.append(queue.Lock.take(path, wait=True)))
    thread.start()
    time.sleep(0.2)  # it has opened the file and waits for the lock
    path.unlink()
    second.close()
    thread.join(10)
    assert late[0] is not None and os.fstat(late[0].descriptor or 0).st_ino == path.stat().st_ino
    late[0].close()
    # Even with the device's file gone, the ticket of its holder speaks for it.
    with leases.lease(needs(1), "sample@a"):
        (machine.leases / f"{gpu(0)['uuid']}.lock").unlink()
        ticket = queue.ask(machine.leases, holder="b", gpus=1, candidates=[gpu(0)["uuid"]], token="t")
        assert queue.attempt(machine.leases, ticket, lambda uuid: None).devices is None
        ticket.release()


def test_cuda_that_already_runs_cannot_be_limited(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA already runs in this process"):
        leases.lease(needs(1), "sample@a").__enter__()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with leases.lease(needs(1), "sample@a") as lease:  # no choice, so nothing to limit
        assert lease.devices == tuple(nvml.my_devices())
