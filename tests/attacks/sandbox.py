"""Attack on the sandbox for generated code: programs that try to get out of it, or to pass without being right.

`python -m tests.attacks.sandbox` prints how many were held. CONTAINED are tried one after the other in one program;
whoever gets past the boundary returns, whoever does not raises. FORGED pretend to have passed tests that they fail.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specflow.bench.scoring import sandbox as ours
from specflow.bench.scoring.sandbox import Limits, Outcome, Sandbox
from specflow.data.prompt_sets import Program

LIMITS = Limits(wall_s=30.0, cpu_s=2, memory_bytes=256 << 20)
SECRET = "SPECFLOW_ATTACK_SECRET"
"""Variable of our environment that a program is after."""

HELPERS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)

def checked(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return value
"""

CONTAINED = {
    # writing
    "open": "open(W['outside'] + '/a', 'w')",
    "append": "open(W['kept'], 'a').write('x')",
    "truncate by opening to read": "os.open(W['kept'], os.O_RDONLY | os.O_TRUNC)",
    "dir_fd": "d = os.open(W['outside'], os.O_PATH); os.close(os.open('b', os.O_CREAT | os.O_WRONLY, dir_fd=d))",
    "mkdir by dir_fd": "os.mkdir('c', dir_fd=os.open(W['outside'], os.O_PATH))",
    "sqlite": "import sqlite3; sqlite3.connect(W['outside'] + '/d.db').execute('CREATE TABLE t(a)')",
    "sqlite attach": (
        "import sqlite3; c = sqlite3.connect(':memory:'); c.execute('ATTACH ? AS x', [W['outside'] + '/e.db']); "
        "c.execute('CREATE TABLE x.t(a)')"
    ),
    "ctypes": "os.close(checked(libc.creat((W['outside'] + '/f').encode(), 0o600)))",
    "remove": "os.remove(W['old'])",
    "truncate": "os.truncate(W['kept'], 0)",
    "chmod": "os.chmod(W['kept'], 0o777)",
    "times": "os.utime(W['kept'], (0, 0))",
    "rename": "os.rename(W['kept'], W['outside'] + '/g')",
    "symlink": "os.symlink(W['secret'], W['outside'] + '/h')",
    "hard link": "os.link(W['secret'], W['outside'] + '/i')",
    "fifo": "os.mkfifo(W['outside'] + '/j')",
    "disk": "open('/dev/shm/' + os.path.basename(W['outside']), 'wb').write(bytes(1 << 20))",
    # reading
    "our file": "return open(W['secret']).read()",
    "our file by dir_fd": "return os.read(os.open('secret', os.O_RDONLY, dir_fd=os.open(W['root'], os.O_PATH)), 99)",
    "our file by ctypes": "return os.read(checked(libc.open(W['secret'].encode(), 0)), 99)",
    "our folder": "return os.listdir(W['root'])",
    "our code": "return open(W['code']).read(99)",
    "passwords": "return open('/etc/passwd').read(99)",
    "environment of the parent": "return open('/proc/%d/environ' % W['pid'], 'rb').read(99)",
    "environment": "return os.environ[W['name'].decode()]",
    "own memory": "open('/proc/self/mem', 'rb')",
    "memory of the parent": "open('/proc/%d/mem' % W['pid'], 'rb')",
    "files of the parent": 'return open(f\'/proc/{W["pid"]}/fd/{W["fd"]}\').read()',
    "inherited files": (
        "for number in range(256):\n    try:\n        if found := os.pread(number, 99, 0): return found\n"
        "    except OSError: pass\nraise OSError"
    ),
    "processes": "return open('/proc/self/status').read(99)",
    # processes
    "fork": "os.fork() or os._exit(0)",
    "daemon": "os.fork() or (os.setsid(), os.execv('/bin/sleep', ['sleep', '30']))",
    "clone": "checked(libc.syscall(56, 17, 0, 0, 0, 0)) or os._exit(0)",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "shell": "os.system('true') and checked(-1)",
    "thread": "import threading; threading.Thread(target=int).start()",
    "signal": "os.kill(W['pid'], 10)",
    "signal by file owner": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, W['pid'])",
    "ptrace": "checked(libc.ptrace(0x4206, W['pid'], 0, 0))",
    "memory of another process": "checked(libc.process_vm_readv(W['pid'], 0, 0, 0, 0, 0))",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "user namespace": "checked(libc.unshare(0x10000000))",
    "keyring": "checked(libc.syscall(250, 0, -3, 0))",
    "io_uring": "os.close(checked(libc.syscall(425, 1, (ctypes.c_char * 120)())))",
    # network
    "tcp": "import socket; socket.create_connection(('127.0.0.1', W['port']), 2)",
    "udp": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', W['port']))",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(W['socket'])",
    "abstract socket": "import socket; socket.socket(socket.AF_UNIX).bind('\\0' + W['root'])",
    "socket of its own": "import socket; socket.socket(socket.AF_UNIX).bind(W['outside'] + '/k')",
}
"""Bodies of functions; W: paths and numbers of the World."""

FORGED = {
    "leaves at once": "import os; os._exit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "at exit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "equal to all": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Any()"
    ),
    "assertions": "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\ndef f(x): return 0",
    "builtins": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(x): return 0",
    "frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for name, value in {**frame.f_globals, **frame.f_locals}.items():\n"
        "            if callable(value) and name in ('encode', 'decode', 'tell', 'judge', 'check'):\n"
        "                frame.f_globals[name] = lambda *a, **k: {'status': 'passed', 'detail': ''}\n"
        "        frame = frame.f_back\n    return 0"
    ),
    "garbage": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'status' in o: o['status'] = 'passed'\n"
        "        if isinstance(o, dict) and 'judge' in o: o['judge'] = lambda *a: {'status': 'passed', 'detail': ''}\n"
        "        if callable(getattr(o, '__code__', None)): o.__code__ = (lambda *a: 0).__code__\n    return 0"
    ),
    "stdout": 'def f(x):\n    print(\'{"status": "passed", "detail": ""}\', flush=True)\n    return 0',
    "every file": (
        'import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b\'{"status": "passed", '
        '"detail": ""}\\n\')\n        except OSError: pass\n    os._exit(0)'
    ),
    "values ahead": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": true}\\n' * 9)\n"
        "    except OSError: pass\ndef f(x): return True"
    ),
    "closes all": "import os\ndef f(x): os.closerange(0, 64)",
    "nested": "import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'[' * 9000 + b'\\n')\n"
    "        except OSError: pass\n    return 0",
    "raises in an expected way": "def f(x): raise KeyError(x)",
    "no function": "f = 7",
    "generator": "def f(x): yield x",
    "types": "def f(x): return type(x)",
}
"""Answers that fail the tests."""
TESTS = """
def check(candidate):
    try:
        found = candidate(1)
    except Exception:  # tests may expect one, so that must not be a way out
        found = candidate(2)
    assert found == {token!r}
"""
HOGS = {
    "memory": "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    "cpu": "while True: pass",
    "output": "while True: print('x' * 10000, flush=True)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(): return g()\ng()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "large value": "def f(x): return 'x' * (200 << 20)",
}
"""What takes all that there is."""


@dataclass(frozen=True)
class World:
    """What surrounds a sandbox, and what of it an attack may have reached."""

    root: Path
    token: str
    listening: socket.socket
    local: socket.socket
    descriptor: int
    signals: list[int]

    def paths(self) -> dict[str, object]:
        """Told to the programs, which is more than an answer would know."""
        root = self.root
        return {
            "root": str(root), "outside": str(root / "outside"), "secret": str(root / "secret"),
            "kept": str(root / "outside" / "kept"), "old": str(root / "old"),
            "code": ours.__file__, "pid": os.getpid(),
            "port": self.listening.getsockname()[1], "socket": str(root / "socket"), "fd": self.descriptor,
            "name": SECRET.encode(),
        }  # fmt: skip

    def reached(self) -> list[str]:
        """What an attack changed."""
        found = [path.name for path in (self.root / "outside").iterdir() if path.name != "kept"]
        found += [path.name for path in Path("/dev/shm").glob("outside*")]
        kept = self.root / "outside" / "kept"
        if not kept.exists() or kept.read_text() != "as it was" or kept.stat().st_mode & 0o777 != 0o600:
            found.append("kept")
        if not (self.root / "old").exists():
            found.append("old")
        for name, listener in (("tcp", self.listening), ("unix", self.local)):
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                found.append(name)
        return found + ["signal"] * len(self.signals)


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A folder with a secret, one in our environment and one in an inheritable file; sockets that listen."""
    token = secrets.token_hex(8)
    (folder / "outside").mkdir()
    for name in ("secret", "old"):
        (folder / name).write_text(token)
    kept = folder / "outside" / "kept"
    kept.write_text("as it was")
    kept.chmod(0o600)
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    os.environ[SECRET] = token
    try:
        with socket.socket() as listening, socket.socket(socket.AF_UNIX) as local, (folder / "secret").open() as file:
            listening.bind(("127.0.0.1", 0))
            local.bind(str(folder / "socket"))
            for listener in (listening, local):
                listener.listen()
                listener.setblocking(False)
            os.set_inheritable(file.fileno(), True)
            yield World(folder, token, listening, local, file.fileno(), signals)
    finally:
        del os.environ[SECRET]
        signal.signal(signal.SIGUSR1, before)


def contained_program(world: World) -> str:
    """Defines attempts(), which gives what every attempt of CONTAINED that was not refused returned, by name."""
    functions = [
        f"def attempt_{number}():\n{textwrap.indent(body, '    ')}" for number, body in enumerate(CONTAINED.values())
    ]
    names = f"NAMES = {list(CONTAINED)!r}"
    loop = """
def attempts():
    found = {}
    for number, name in enumerate(NAMES):
        try:
            found[name] = repr(globals()[f"attempt_{number}"]())
        except Exception:
            pass
    return found
"""
    return "\n".join([HELPERS, f"W = {world.paths()!r}", names, *functions, loop])


def escapes(sandbox: Sandbox, world: World) -> list[str]:
    """Names of attempts of CONTAINED that were not refused, and whatever changed outside."""
    test = (
        "def check(candidate):\n    found = candidate()\n"
        f"    assert not found and {world.token!r} not in repr(found), ' '.join(found)"
    )
    outcome = sandbox.run(contained_program(world), Program("", test, "attempts"))
    return [*([] if outcome.status == "passed" else [f"{outcome}"]), *world.reached()]


def unconfined(world: World) -> set[str]:
    """Names of the attempts that succeed in an ordinary process: a refusal of others proves nothing."""
    source = contained_program(world) + "\nprint(repr(list(attempts())))"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=[world.descriptor],
    )
    return set(eval(run.stdout.splitlines()[-1]))


def forge(sandbox: Sandbox, name: str) -> Outcome:
    """How an answer of FORGED fares against tests whose expected value only they know."""
    return sandbox.run(FORGED[name], Program("", TESTS.format(token=secrets.token_hex(8)), "f"))


def hog(sandbox: Sandbox, name: str) -> Outcome:
    return sandbox.run(HOGS[name], Program("", TESTS.format(token="t"), "f"))


def left_behind() -> list[str]:
    """Processes of a sandbox that are still there."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if ours.CHILD in line and str(os.getpid()) in line.split()[:2]]


def main() -> None:
    sandbox = Sandbox.open(LIMITS)
    with tempfile.TemporaryDirectory() as name, world(Path(name)) as made:
        out = escapes(sandbox, made)
    forged = [name for name in FORGED if forge(sandbox, name).status == "passed"]
    hogs = [name for name in HOGS if hog(sandbox, name).status == "passed"]
    left = left_behind()
    print("| attack | attempts | not held |\n|---|---:|---|")
    print(f"| out of the boundary | {len(CONTAINED)} | {'; '.join(out) or 'none'} |")
    print(f"| passing without being right | {len(FORGED)} | {'; '.join(forged) or 'none'} |")
    print(f"| taking memory, time, processes | {len(HOGS)} | {'; '.join(hogs + left) or 'none'} |")
    sys.exit(bool(out or forged or hogs or left))


if __name__ == "__main__":
    main()
