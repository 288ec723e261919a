"""Whether the machine stayed the same over the run: the target's own speed over time, and the speedup of each repeat.

Each request is timed again in every repeat, minutes to hours later. What changes between those times is the machine,
as the work is the same. The engines of a pair run one after the other, so that a slow drift hits both: it is reported.
A speedup that itself changes from repeat to repeat by more than the effect allows no conclusion.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from specflow.bench.statistics.intervals import LEVEL
from specflow.bench.statistics.metrics import speedup, tok_s
from specflow.bench.statistics.records import Record, paired
from specflow.results.schema import Drift, Interval, RepeatSpeed


def drift(baseline: Sequence[Record], engine: Sequence[Record], *, most_at_once: int) -> Drift:
    """Drift of the target's own speed, and both speeds by repeat.

    Changes are None where the records carry no times or nothing was repeated. `most_at_once`: the function's, of all
    engines' records.
    """
    timed = [r for r in baseline if r.started_at > 0 and len(r.token_ids) > 0]
    span_s = max(r.started_at + r.total_s for r in timed) - min(r.started_at for r in timed) if timed else None
    per_hour: float | None = None
    change: float | None = None
    interval: Interval | None = None
    line = log_speed_per_second(timed)
    if line is not None and span_s is not None:
        slope, half = line
        per_hour, change = _grown(slope * 3600), _grown(slope * span_s)
        interval = _grown((slope - half) * span_s), _grown((slope + half) * span_s)
    return Drift(
        span_s=span_s,
        baseline_per_hour=per_hour,
        baseline_change=change,
        baseline_change_ci=interval,
        by_repeat=by_repeat(baseline, engine),
        most_at_once=most_at_once,
    )


def _grown(exponent: float) -> float:
    """Relative change of a logarithm's change; capped, as a run of a second can have any slope."""
    return math.expm1(min(exponent, 50.0))


def log_speed_per_second(records: Sequence[Record]) -> tuple[float, float] | None:
    """Least squares slope of log(tokens per second) over `started_at`, and half its 95 % interval.

    Each request has a level of its own, as long and short ones differ in speed: only differences between the repeats of
    one request count. None where none was repeated.
    """
    groups: dict[tuple[str, str, int, int], list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        groups[record.request].append((record.started_at, math.log(tok_s([record]))))
    within = [np.array(rows) - np.mean(rows, axis=0) for rows in groups.values() if len(rows) > 1]
    if not within:
        return None
    times, speeds = np.concatenate(within).T
    freedom = len(times) - len(within) - 1
    spread = float(times @ times)
    if freedom < 1 or spread <= 0:
        return None
    slope = float(times @ speeds) / spread
    rest = speeds - slope * times
    error = math.sqrt(float(rest @ rest) / freedom / spread)
    return slope, float(stdtrit(freedom, (1 + LEVEL) / 2)) * error


def by_repeat(baseline: Sequence[Record], engine: Sequence[Record]) -> list[RepeatSpeed]:
    """Both speeds and the speedup of each repeat, over the pairs that it has."""
    rows = []
    for repeat in sorted({record.repeat for record in baseline}):
        pairs = paired([r for r in baseline if r.repeat == repeat], [r for r in engine if r.repeat == repeat])
        if pairs:
            alone, drafted = tok_s([b for b, _ in pairs]), tok_s([e for _, e in pairs])
            rows.append(
                RepeatSpeed(
                    repeat=repeat,
                    num_pairs=len(pairs),
                    baseline_tok_s=alone,
                    tok_s=drafted,
                    speedup=speedup(pairs),
                )
            )
    return rows


def most_at_once(records: Sequence[Record]) -> int:
    """The most requests that were under way at the same time: 1 for one worker, 0 where the times are not known."""
    timed = [r for r in records if r.started_at > 0]
    # A hundredth is left off each request: the wall clock that starts it and the one that times it are not the same.
    ends = [(r.started_at + 0.99 * r.total_s, -1) for r in timed]
    running, most = 0, 0
    for _, change in sorted([*((r.started_at, 1) for r in timed), *ends]):
        running += change
        most = max(most, running)
    return most


def machine_load(wait_s: float = 0.5) -> dict[str, float | int | None]:
    """What else the machine does, to be asked before a run begins its own work.

    `busy_share`: share of all cores' time that was not idle while this process slept for `wait_s`; what a hypervisor
    took away counts. `load_average`: of the last minute, which also remembers our own earlier work. None: not known.
    """
    before = _cpu_times()
    time.sleep(wait_s)
    after = _cpu_times()
    busy = None
    if before is not None and after is not None and sum(after) > sum(before):
        idle = sum(after[3:5]) - sum(before[3:5])  # idle and waiting for a disk
        busy = 1.0 - idle / (sum(after) - sum(before))
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"busy_share": busy, "load_average": average, "num_cores": os.cpu_count()}


def _cpu_times() -> list[int] | None:
    """user, nice, system, idle, iowait, irq, softirq, steal of all cores since the start (proc(5))."""
    file = Path("/proc/stat")
    return [int(word) for word in file.read_text().split("\n", 1)[0].split()[1:9]] if file.exists() else None
