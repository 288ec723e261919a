"""The queue for devices: a folder of lock files that every process of the machine shares. Knows nothing of NVML.

A request is a ticket, a file that its process keeps locked from asking to giving back; numbers are handed out in order.
A held device is a locked file `<uuid>.lock`. A child that uses its parent's lease has a ticket of its own, which names
the devices: they stay taken until both are gone. The kernel drops locks with their process: what a killed process held
is free at once, and a ticket that can be locked belongs to nobody. Every look and change happens under one lock on the
file `queue`, for milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from specflow.errors import UserError
from specflow.locks import Lock

FOLDER_VARIABLE = "SPECFLOW_LEASE_DIR"
DEFAULT_FOLDER = Path("/tmp/specflow-leases")
"""Not tempfile.gettempdir(): TMPDIR may differ by user or by job, and then nobody would see anybody's leases."""
ASIDE_SECONDS = 5.0
"""A request that only a foreign process keeps from its devices lets later ones pass after this time."""


@dataclass(frozen=True)
class Request:
    """A ticket's content, for everybody to read; devices are UUIDs, times are seconds since the epoch."""

    number: int
    pid: int
    user: str
    holder: str
    gpus: int
    candidates: tuple[str, ...]
    token: str
    """Names the lease to child processes (SPECFLOW_LEASE)."""
    asked_s: float
    granted_s: float | None = None
    devices: tuple[str, ...] = ()
    aside: bool = False
    """Kept from its devices by foreign processes: claims nothing until they are gone."""


@dataclass
class Ticket:
    """This process's own request."""

    path: Path
    lock: Lock
    request: Request
    devices: list[Lock] = field(default_factory=list)
    blocked_since: float | None = None

    def write(self, **changes: object) -> None:
        """Record changes; only under the queue's lock. Readers take the first line, so old bytes may stay behind it."""
        self.request = replace(self.request, **changes)  # type: ignore[arg-type]
        assert self.lock.descriptor is not None
        os.pwrite(self.lock.descriptor, json.dumps(asdict(self.request)).encode() + b"\n", 0)

    def release(self) -> None:
        """Give everything back; a forked child, which holds nothing, does nothing."""
        if self.lock.descriptor is not None:
            self.path.unlink(missing_ok=True)
            self.lock.close()
            for lock in self.devices:
                lock.close()


@dataclass(frozen=True)
class Answer:
    """Of one attempt: the devices, or None and who was in the way."""

    devices: tuple[str, ...] | None
    requests: tuple[Request, ...] = ()
    """All live ones, in order."""
    reasons: tuple[tuple[str, str], ...] = ()
    """(device, why NVML says no) of devices that nobody leases."""
    locked: tuple[str, ...] = ()
    """Devices whose file another program has locked."""


def folder() -> Path:
    """The folder of this machine's leases, open to every user. Raises UserError where it cannot be used."""
    path = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    try:
        path.mkdir(parents=True)
        path.chmod(0o1777)  # everybody may add files, only their owner may remove them
    except FileExistsError:
        pass
    except OSError as error:
        raise _unusable(path, error.strerror) from None
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise _unusable(path, "not a folder that you may write to")
    return path


def ask(place: Path, *, holder: str, gpus: int, candidates: Sequence[str], token: str) -> Ticket:
    """Queue up for `gpus` of the `candidates`."""
    with _queue(place) as counter:
        return _ticket(place, counter, holder=holder, gpus=gpus, candidates=tuple(candidates), token=token)


def join(
    place: Path, *, holder: str, gpus: int, token: str, choose: Callable[[Request], tuple[str, ...]]
) -> tuple[Request, Ticket] | None:
    """Use devices of the live lease that `token` names, those that `choose` takes of it; None where it has ended.

    A ticket of our own keeps them from others when the lease's holder dies or gives them back before we do.
    """
    with _queue(place) as counter:
        root = next((request for request in live_requests(place) if request.token == token and request.devices), None)
        if root is None:
            return None
        devices = choose(root)
        terms: dict[str, Any] = {"holder": holder, "gpus": gpus, "candidates": devices, "token": token}
        return root, _ticket(place, counter, **terms, devices=devices, granted_s=time.time())


def _ticket(place: Path, counter: int, **terms: Any) -> Ticket:
    """A new ticket, under the queue's lock; `terms` of the Request besides number and owner."""
    number = 1 + max([_number(counter), *(int(path.name.split("-")[1]) for path in _ticket_files(place))])
    os.pwrite(counter, b"%020d\n" % number, 0)
    path = place / f"ticket-{number:020d}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.fchmod(descriptor, 0o644)
    ticket = Ticket(path, Lock(descriptor), Request(number, os.getpid(), _user(), asked_s=time.time(), **terms))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        ticket.write()
    except BaseException:
        ticket.release()
        raise
    return ticket


def attempt(place: Path, ticket: Ticket, busy: Callable[[str], str | None]) -> Answer:
    """Take the devices if it is this ticket's turn. `busy` tells why a device that nobody leases cannot be taken.

    Earlier requests that still wait claim all their candidates, so a request for two devices is not starved by
    requests for one, while those with other candidates go on.
    """
    with _queue(place):
        requests = live_requests(place)
        mine = ticket.request
        claimed = {
            uuid
            for other in requests
            if other.number < mine.number and other.granted_s is None and not other.aside
            for uuid in other.candidates
        }
        held = {uuid for other in requests for uuid in other.devices}
        taken: dict[str, Lock] = {}
        reasons: list[tuple[str, str]] = []
        locked: list[str] = []
        for uuid in mine.candidates:
            if uuid in claimed or uuid in held or len(taken) == mine.gpus:
                continue
            lock = Lock.take(place / f"{uuid}.lock")
            if lock is None:
                locked.append(uuid)
            elif (reason := busy(uuid)) is not None:
                lock.close()
                reasons.append((uuid, reason))
            else:
                taken[uuid] = lock
        if len(taken) == mine.gpus:
            ticket.devices = list(taken.values())
            ticket.write(devices=tuple(taken), granted_s=time.time(), aside=False)
            return Answer(tuple(taken))
        for lock in taken.values():
            lock.close()
        _step_aside(ticket, len(mine.candidates) - len(reasons) - len(locked) < mine.gpus)
        return Answer(None, tuple(requests), tuple(reasons), tuple(locked))


def requests_now() -> list[Request]:
    """Every live request of the machine, in order; granted ones hold their devices."""
    path = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    if not path.exists():
        return []
    with _queue(folder()):
        return live_requests(path)


def live_requests(place: Path) -> list[Request]:
    """Under the queue's lock: the requests whose process lives; files that dead ones left are removed."""
    found = []
    for path in _ticket_files(place):
        with contextlib.suppress(FileNotFoundError):  # given back while we look
            dead = Lock.take(path, shared=True, create=False)  # shared: a look must not pass for life
            if dead is not None:
                dead.close()
                with contextlib.suppress(PermissionError):  # another user's: theirs to remove
                    path.unlink()
            elif line := path.read_text(encoding="utf-8").partition("\n")[0]:
                found.append(request_of(json.loads(line)))
    return found


def holders(requests: Sequence[Request]) -> dict[str, Request]:
    """Who holds each device: the lease itself, or where it has ended the first child that still uses it."""
    return {uuid: request for request in reversed(requests) for uuid in request.devices}


def request_of(raw: dict[str, Any]) -> Request:
    """A request from its JSON."""
    return Request(**{**raw, "candidates": tuple(raw["candidates"]), "devices": tuple(raw["devices"])})


def _step_aside(ticket: Ticket, blocked: bool) -> None:
    """Mark a request that could not be served even if every lease ended, once that has lasted."""
    now = time.monotonic()
    ticket.blocked_since = (ticket.blocked_since or now) if blocked else None
    aside = ticket.blocked_since is not None and now - ticket.blocked_since >= ASIDE_SECONDS
    if aside != ticket.request.aside:
        ticket.write(aside=aside)


@contextlib.contextmanager
def _queue(place: Path) -> Iterator[int]:
    """The queue's lock; yields the descriptor of its file, which holds the last number."""
    try:
        lock = Lock.take(place / "queue", wait=True)
    except OSError as error:
        raise _unusable(place, error.strerror) from None
    assert lock is not None and lock.descriptor is not None
    try:
        yield lock.descriptor
    finally:
        lock.close()


def _number(counter: int) -> int:
    text = os.pread(counter, 20, 0)
    return int(text) if text.isdigit() else 0


def _ticket_files(place: Path) -> list[Path]:
    return sorted(place.glob("ticket-*"))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return str(os.getuid())


def _unusable(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"GPU leases cannot be kept in {path} ({reason}): "
        f"set {FOLDER_VARIABLE} to a local folder that every user of the GPUs can write to"
    )
