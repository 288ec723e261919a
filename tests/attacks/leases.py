"""Attack on the leases of GPUs: processes that contend for fake devices and are killed at any moment, children too.

`python -m tests.attacks.leases --leases 10000`. Whether two hold one device is judged by the kernel, not by a record of
times: who believes to hold a device locks a second file of it, in another way than the leases do (see Referee).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import logging
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from specflow.gpus import leases, nvml, queue
from specflow.gpus.resources import Resources
from tests import fake_nvml

WORKERS = 8
LEASES_PER_KILL = 5
STARVED_SECONDS = 60.0
"""Within which every worker must get a lease once the kills have ended."""
PR_SET_CHILD_SUBREAPER = 36
ROOT, NESTED = 0, 1
"""Bytes of a referee's file: locked by who leased the device, and by children that use their parent's lease."""


class Referee:
    """POSIX record locks on a file for each device, held while a process believes to hold the device.

    It cannot take a killed holder for a living one: the kernel drops a process's record locks as it closes its files,
    before it gives up the last reference to them, which is what frees the leases' flocks. Opened before any
    lease, so that the order holds on kernels that give both up at once, lower descriptors first.
    """

    def __init__(self, folder: Path, uuids: Sequence[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.files = {uuid: os.open(folder / uuid, os.O_RDWR | os.O_CREAT) for uuid in uuids}

    def enter(self, uuid: str, *, parent: int | None = None) -> str:
        """Believe to hold `uuid`, or under the lease of process `parent`; what speaks against it, or ""."""
        descriptor = self.files[uuid]
        own, other = (ROOT, NESTED) if parent is None else (NESTED, ROOT)
        try:  # several children may share their parent's device
            fcntl.lockf(descriptor, (fcntl.LOCK_EX if parent is None else fcntl.LOCK_SH) | fcntl.LOCK_NB, 1, own)
        except OSError:
            return f"{uuid} of pid {os.getpid()} is held by pid {self._locked_by(descriptor, own)}"
        holder = self._locked_by(descriptor, other)
        return "" if holder in (None, parent) else f"{uuid} of pid {os.getpid()} is held by pid {holder}, {parent=}"

    def leave(self) -> None:
        for descriptor in self.files.values():
            fcntl.lockf(descriptor, fcntl.LOCK_UN)

    @staticmethod
    def _locked_by(descriptor: int, byte: int) -> int | None:
        layout = "hhqqi4x"  # struct flock on 64-bit Linux
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else pid


@dataclass
class Figures:
    """What came of an attack."""

    devices: int
    counts: Counter[str] = field(default_factory=Counter)
    """`leases`, those with `several` devices, `nested` ones of children, `orphans` that outlived a lease; `kills`."""
    doubles: list[str] = field(default_factory=list)
    starved: int = 0
    left: list[str] = field(default_factory=list)
    """Tickets that are still there once everybody is gone."""

    def row(self) -> str:
        """Of a Markdown table under HEADER."""
        keys = ("leases", "several", "nested", "orphans", "kills")
        cells = [self.devices, *(self.counts[key] for key in keys), len(self.doubles), self.starved, len(self.left)]
        return f"| {' | '.join(f'{cell:,}' for cell in cells)} |"


HEADER = (
    "| devices | leases | of several devices | nested in a parent's | children that outlive the lease | kills "
    "| double leases | starved | tickets left |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


class Worker:
    """A process that takes one lease after the other until the file `stop` is there, then one more."""

    def __init__(self, folder: Path, devices: int, report: int, seed: int) -> None:
        self.stop, self.devices, self.report = folder / "stop", devices, report
        self.rng = random.Random(seed)
        self.referee = Referee(folder / "referee", [fake_nvml.gpu(number)["uuid"] for number in range(devices)])

    def say(self, word: str, text: str = "") -> None:
        os.write(self.report, f"{word} {os.getpid()} {text}\n".encode())  # one write: lines of several do not mix

    def run(self) -> None:
        last = False
        while not last:
            last = self.stop.exists()
            count = self.rng.randint(1, self.devices)
            with self.hold(count, None):
                self.say("leases")
                if count > 1:
                    self.say("several")
                longest = 0.01
                if self.rng.random() < 0.1:
                    self.fork(self.rng.choice([self.nested, self.orphan]))
                    longest = 0.2  # some children are there in time, some are not
                time.sleep(self.rng.uniform(0, longest))
        self.say("ended")

    @contextlib.contextmanager
    def hold(self, count: int, parent: int | None) -> Iterator[bool]:
        """Lease `count` devices and tell the referee; yields whether it is under the lease of process `parent`."""
        with leases.lease(Resources(count, None, declared=True), f"sample@{os.getpid()}") as lease:
            nested = parent is not None and lease.root_pid == parent
            for device in lease.devices:
                if against := self.referee.enter(device.uuid, parent=parent if nested else None):
                    self.say("double", against)
            yield nested
            self.referee.leave()

    def nested(self, parent: int) -> None:
        """A command under its parent's lease; may outlive it, and may come too late for it: then it queues up."""
        with self.hold(1, parent) as nested:
            self.say("nested" if nested else "leases")
            time.sleep(self.rng.uniform(0, 0.1))

    def orphan(self, parent: int) -> None:
        """A process that knows nothing of leases."""
        self.say("orphans")
        time.sleep(self.rng.uniform(0, 0.3))

    def fork(self, child: Callable[[int], None]) -> None:
        parent = os.getpid()
        if os.fork() == 0:
            forked(lambda: child(parent))


def forked(body: Callable[[], None]) -> None:
    """A forked process's life: never back into the code that forked it."""
    try:
        body()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def attack(folder: Path, *, devices: int, num_leases: int, seed: int = 0) -> Figures:
    """Let WORKERS contend for `devices` until `num_leases` were had, kill one or a child of one now and then."""
    rng = random.Random(seed)
    reading, report = os.pipe()
    figures = Figures(devices)
    live: set[int] = set()
    children: set[int] = set()
    ended: set[int] = set()
    stopping: float | None = None
    text = b""
    fake_nvml.Machine(folder, [fake_nvml.gpu(number) for number in range(devices)])
    while stopping is None or live:
        while stopping is None and len(live) < WORKERS:
            worker_seed = rng.getrandbits(32)
            if (pid := os.fork()) == 0:
                forked(Worker(folder, devices, report, worker_seed).run)
            live.add(pid)
        if stopping is None and figures.counts["kills"] * LEASES_PER_KILL < figures.counts["leases"]:
            time.sleep(rng.uniform(0, 0.02))  # whatever they do by then
            os.kill(rng.choice([*live, *children]), signal.SIGKILL)
            figures.counts["kills"] += 1
        select.select([reading], [], [], 0.01)
        while select.select([reading], [], [], 0)[0]:
            text += os.read(reading, 1 << 16)
        *lines, text = text.split(b"\n")
        for line in lines:
            word, pid_text, said = line.decode().split(" ", 2)
            figures.counts[word] += 1
            if word == "double":
                figures.doubles.append(said)
            elif word in ("nested", "orphans"):
                children.add(int(pid_text))
            elif word == "ended":
                ended.add(int(pid_text))
        dead = set(reaped())
        live, children = live - dead, children - dead
        if stopping is None and figures.counts["leases"] >= num_leases:
            stopping = time.monotonic()
            (folder / "stop").touch()
            last = set(live)
        if stopping is not None and time.monotonic() - stopping > STARVED_SECONDS:
            for pid in live:
                os.kill(pid, signal.SIGKILL)
    figures.starved = len(last - ended)
    os.close(report)
    while os.read(reading, 1 << 16):  # children of children have it open until they end
        pass
    os.close(reading)
    with patch.dict(os.environ, {queue.FOLDER_VARIABLE: str(folder / "leases")}):
        queue.requests_now()  # removes what dead processes left
        figures.left = [path.name for path in (folder / "leases").glob("ticket-*")]
    return figures


def reaped() -> Iterator[int]:
    """Children of ours that have ended. Their numbers were taken until now, so that a kill met no stranger."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            assert ended[1] in (0, signal.SIGKILL), f"process {ended[0]} of the attack failed"
            yield ended[0]


@contextlib.contextmanager
def fake_machine(folder: Path) -> Iterator[None]:
    """This process and its children see the fake NVML of `folder`, and wait in small steps."""
    machine = {"FAKE_NVML": str(folder / "machine.json"), queue.FOLDER_VARIABLE: str(folder / "leases")}
    without = {key: value for key, value in os.environ.items() if key not in (leases.VISIBLE, leases.MARK)}
    with (
        patch.dict(os.environ, {**without, **machine}, clear=True),
        patch.object(sys, "path", [str(fake_nvml.FOLDER), *sys.path]),
        patch.object(leases, "POLL_SECONDS", 0.02),
    ):
        nvml.driver()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--leases", type=int, default=10_000, help="in all, divided over 1, 2 and 3 devices")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("specflow").setLevel(logging.ERROR)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # children of killed workers become ours
    print(HEADER, flush=True)
    bad = 0
    for devices in (1, 2, 3):
        with tempfile.TemporaryDirectory() as name, fake_machine(Path(name)):
            figures = attack(Path(name), devices=devices, num_leases=-(-options.leases // 3), seed=options.seed)
        print(figures.row(), *figures.doubles[:10], sep="\n", flush=True)
        bad += len(figures.doubles) + figures.starved + len(figures.left)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
