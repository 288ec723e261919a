"""served.json: everything that a benchmark through inference servers found, each field with its meaning and unit.

Times are milliseconds where a name ends in `_ms`, else seconds; speeds are output tokens per second (`tok_s`). None:
not measured, or the server does not tell. docs/serving.md defines each number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import ConfigDict, Field

from specflow.config_bench import BenchServe
from specflow.paths import Paths
from specflow.results.files import Part, read_result
from specflow.results.schema import Divergence, Interval

SCHEMA_VERSION: Final = 1
ServedEngine = Literal["vllm", "sglang", "openai"]
Side = Literal["baseline", "draft"]


class ServedSettings(BenchServe):
    max_new_tokens: int
    temperature: float
    num_requests: int
    """Different requests, each asked several times."""


class Server(Part):
    """What is known of one server."""

    url: str | None
    """None of one that the benchmark started."""
    num_gpus: int | None
    dtype: str | None
    k: int | None
    """Drafted tokens a step as SGLang counts them, less the root."""
    version: str | None
    flags: list[tuple[str, str]]
    """Flags and environment, less what may differ within a pair: speculation and the port."""
    command: str | None = None
    """None of one that somebody else started."""


class Servers(Part):
    baseline: Server
    draft: Server


class Percentiles(Part):
    p50: float | None
    p90: float | None
    p99: float | None


class SideResult(Part):
    """One server at one concurrency, over its blocks."""

    num_requests: int
    num_errors: int
    """Failed requests: they give no token and no latency."""
    num_tokens: int
    seconds: float
    """Wall time of the blocks, first request sent to last one answered."""
    tok_s: float
    tok_s_per_gpu: float | None
    user_tok_s: float | None
    """Mean over requests of 1 / TPOT."""
    ttft_ms: Percentiles
    """Time to the first token."""
    tpot_ms: Percentiles
    """Time per further token."""
    itl_ms: Percentiles
    """Gap between messages that hold tokens."""
    e2e_ms: Percentiles
    """Time to the last token."""


class ServedAcceptance(Part):
    model_config = ConfigDict(populate_by_name=True)

    source: Literal["requests", "counters"] = Field(validation_alias="from", serialization_alias="from")
    """Each request's own steps, or the server's counters."""
    length: float
    macro_length: float | None
    survival: list[float]
    conditional: list[float]
    histogram: dict[int, int] | None
    num_steps: int
    num_drafted: int
    num_accepted: int


class Level(Part):
    """Both servers at one concurrency."""

    concurrency: int
    """Requests in flight at a time."""
    baseline: SideResult
    draft: SideResult
    speedup: float
    """Output tok/s with the draft over those without."""
    speedup_range: Interval
    """Lowest and highest of the repeats."""
    acceptance: ServedAcceptance | None
    lossless_rate: float | None
    """Share of requests whose output is the target's own; None under sampling."""
    first_divergence: Divergence | None

    def of(self, side: Side) -> SideResult:
        return self.draft if side == "draft" else self.baseline

    @property
    def num_errors(self) -> int:
        return self.draft.num_errors + self.baseline.num_errors

    @property
    def num_requests(self) -> int:
        return self.draft.num_requests + self.baseline.num_requests


class BlockResult(Part):
    """All requests of one server at one concurrency, once through."""

    engine: Side
    concurrency: int
    repeat: int
    wall_s: float
    counters: dict[str, float] | None
    """What the server's counters grew by."""


@dataclass(frozen=True)
class Check:
    """One observable cause of lower served acceptance."""

    what: str
    ok: bool | None
    """None where the server does not tell."""
    found: str


class Gap(Part):
    """Acceptance length on the same prompts, as training expected it, in process and served."""

    set: str
    """`heldout`, or `all sets` where the benchmark asked none of those."""
    num_requests: int
    expected: float | None
    in_process: float
    served: float
    served_interval: Interval | None
    gap: float
    """Served over expected, less 1; over in process where nothing is expected."""
    gap_to_in_process: float
    """Served over in process, less 1."""
    apart: bool
    """Whether one of the two is far enough from 0 to look for a cause."""
    advice: list[str]
    """Where to look, the likeliest first."""
    checks: list[Check]


class Served(Part):
    """bench/served.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    engine: ServedEngine
    num_speculative_tokens: int
    settings: ServedSettings
    servers: Servers
    levels: list[Level] = Field(min_length=1)
    """By ascending concurrency."""
    break_even_concurrency: float | None
    """Where the draft stops paying; None where it pays at every level."""
    counters_agree: bool | None
    """Whether the requests' own steps add up to what the server counted."""
    blocks: list[BlockResult]
    verdict: str
    gap: Gap | None
    """None where the server tells no acceptance, or nothing was asked in process."""

    @property
    def has_gpus(self) -> bool:
        return any(level.draft.tok_s_per_gpu is not None for level in self.levels)


def read_served(file: Path, *, made_by: str) -> Served:
    """Raises UserError in one line for a file that is missing, damaged or of another version; `made_by` makes it."""
    return read_result(Served, file, version=SCHEMA_VERSION, what="benchmark through servers", made_by=made_by)


def family_served(paths: Paths) -> Served | None:
    """The benchmark of a family through servers; None where there was none."""
    file = paths.bench / "served.json"
    return read_served(file, made_by=f"dvc repro bench@{paths.family}") if file.exists() else None
