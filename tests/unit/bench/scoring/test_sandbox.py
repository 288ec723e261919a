"""Programs that must not get out of the sandbox, run for real; some of them without the interpreter's guard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specflow.bench.scoring import sandbox as sandbox_module
from specflow.bench.scoring.sandbox import PROBE, Limits, Outcome, Sandbox, run_program
from specflow.errors import UserError

LIMITS = Limits(wall_s=3.0, cpu_s=1, memory_bytes=256 << 20, file_bytes=100_000)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox.open(LIMITS)


def test_right_and_wrong_programs(sandbox: Sandbox) -> None:
    assert sandbox.run("assert 1 + 1 == 2; print('fine')").status == "passed"
    wrong = sandbox.run("assert 1 + 1 == 3")
    assert (wrong.status, wrong.exit_code) == ("failed", 1) and "AssertionError" in wrong.output
    broken = sandbox.run("x = (")
    assert broken.status == "failed" and "SyntaxError" in broken.output
    assert sandbox.run(PROBE).status == "passed"


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"])
def test_leaving_early_is_not_passing(sandbox: Sandbox, leave: str) -> None:
    """A program that ends before its tests have run exits with 0, and has not passed them."""
    assert sandbox.run(f"{leave}\nassert False").status == "failed"
    assert sandbox.run("import sys; sys.exit(3)").exit_code == 3


def test_endless_loop_and_endless_sleep(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert sandbox.run("while True: pass").status == "timeout"
    assert time.monotonic() - began < LIMITS.wall_s  # the limit on CPU time came first
    assert run_program("import time; time.sleep(60)", Limits(wall_s=0.5)).status == "timeout"
    assert time.monotonic() - began < 10


FORK_BOMB = """
import os, sys, time
{unguard}
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(100)
    except OSError as error:
        print(type(error).__name__)
        break
else:
    print("forked 200 times")
"""


def test_fork_bomb(sandbox: Sandbox) -> None:
    """The guard refuses the first fork, and where it is not there the limit on processes does."""
    guarded = sandbox.run(FORK_BOMB.format(unguard=""))
    assert guarded.output.split() == ["PermissionError"]
    if sandbox.granted["processes"]:
        bare = run_child_without_guard(FORK_BOMB.format(unguard=""), sandbox)
        assert bare.output.split() == ["BlockingIOError"]  # EAGAIN
    assert not processes_of("sandbox_child.py")


def run_child_without_guard(source: str, sandbox: Sandbox) -> Outcome:
    """As run_program does, but with a child whose guard is missing: only the system's own limits are left."""
    child = sandbox_module.CHILD
    bare = child.with_name("sandbox_child.py").read_text(encoding="utf-8").replace('    guard(task["folder"])\n', "")
    assert "    guard(" not in bare
    copy = Path(os.environ.get("TMPDIR", "/tmp")) / f"sandbox_child.py-{os.getpid()}.py"
    copy.write_text(bare, encoding="utf-8")
    copy.chmod(0o644)
    try:
        sandbox_module.CHILD = copy
        return run_program(source, sandbox.limits, drop_user=sandbox.drop_user)
    finally:
        sandbox_module.CHILD = child
        copy.unlink()


def processes_of(name: str) -> list[str]:
    """Command lines with this name that are not this test's own."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if name in line and sys.executable in line and "pytest" not in line]


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    """Where the system lets it start processes (root keeps that right), they are killed with its session."""
    source = "import os, time\npid = os.fork()\nif pid == 0: time.sleep(100)\nprint(pid)"
    limits = Limits(wall_s=3.0, cpu_s=1)
    unlimited = Sandbox(limits, drop_user=False, granted={})
    outcome = run_child_without_guard(source, unlimited)
    words = outcome.output.split()
    if outcome.status == "passed":
        pid = max(int(word) for word in words)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the child of the program lives on"
            time.sleep(0.05)
    else:
        assert "BlockingIOError" in outcome.output


def test_memory_hog(sandbox: Sandbox) -> None:
    outcome = sandbox.run("kept = []\nwhile True: kept.append(bytearray(16 << 20))")
    assert outcome.status == "failed" and "MemoryError" in outcome.output
    assert sandbox.run("kept = bytearray(64 << 20)").status == "passed"


def test_writing_elsewhere(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    outside = tmp_path / "outside.txt"
    here = "open('here.txt', 'w').write('x'); import os; os.mkdir('d'); os.rename('here.txt', 'd/there.txt')"
    assert sandbox.run(here).status == "passed"
    for source in (
        f"open({str(outside)!r}, 'w')",
        f"import os; os.open({str(outside)!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.mkdir({str(outside)!r})",
        f"import os; open('x', 'w').close(); os.rename('x', {str(outside)!r})",
        f"import os; os.symlink({str(tmp_path)!r}, 'l'); open('l/outside.txt', 'w')",
    ):
        outcome = sandbox.run(source)
        assert outcome.status == "failed" and "PermissionError" in outcome.output, source
    assert not outside.exists()
    kept = tmp_path / "kept.txt"
    kept.write_text("x")
    assert sandbox.run(f"import os; os.remove({str(kept)!r})").status == "failed" and kept.exists()


def test_many_files_and_large_ones(sandbox: Sandbox) -> None:
    large = sandbox.run("open('f', 'wb').write(bytes(200_000))")
    assert large.status == "failed" and "File too large" in large.output
    many = sandbox.run("for i in range(1000): open(f'f{i}', 'w').close()")
    assert many.status == "failed" and "64 files" in many.output


def test_huge_output_is_capped(sandbox: Sandbox) -> None:
    outcome = sandbox.run("while True: print('x' * 1000)")
    assert outcome.status == "failed" and len(outcome.output) <= 2000


def test_no_network_and_no_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = sandbox.run("import os; print(sorted(os.environ))")
    assert eval(outcome.output) == ["HOME", "LC_ALL", "TMPDIR"]
    assert sandbox.run("import socket; socket.socket()").status == "failed"
    if sandbox.granted["network"]:
        reach = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
        bare = run_child_without_guard("print(open('/proc/net/dev').read().count(':'))", sandbox)
        assert bare.output.split() == ["1"], "a loopback alone"
        assert "Error" in run_child_without_guard(reach, sandbox).output


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    folder = sandbox.run("import os; open('f', 'w').close(); print(os.getcwd())").output.strip()
    assert folder and not Path(folder).exists() and not Path(folder).parent.exists()


def test_it_says_what_it_does(sandbox: Sandbox) -> None:
    said = "; ".join(sandbox.describe())
    assert "at most 3 s (1 s of CPU), 256 MiB of memory" in said
    weak = Sandbox(LIMITS, False, dict.fromkeys(("network", "user", "processes"), False))
    told = "; ".join(weak.describe())
    assert all(word in told for word in ("no network of its own", "does not limit its processes", "our own user"))


def test_a_machine_where_nothing_runs_is_one_line() -> None:
    with pytest.raises(UserError, match="no sandbox for code on this machine"):
        Sandbox.open(Limits(wall_s=0.0))
