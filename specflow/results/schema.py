"""summary.json: everything that a benchmark in process found, each field with its meaning and unit.

Times are milliseconds where a name ends in `_ms`, else seconds; speeds are generated tokens per second (`tok_s`);
`_ci` is a 95 % interval over questions. None: not measured, or not known. docs/benchmark.md defines each number.
A field that is renamed, removed or takes another meaning raises SCHEMA_VERSION.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from specflow.config_bench import Bench, Mode, Tree
from specflow.paths import Paths
from specflow.results.files import Part, read_result

SCHEMA_VERSION: Final = 1
Interval = tuple[float, float]
"""Low and high end."""


class Settings(Bench):
    """What was asked for, questions included: benchmarks with the same settings can be compared."""

    serve: None = Field(default=None, exclude=True)
    """Not here: served.json has the settings of the benchmark through servers."""
    mode: Mode
    questions: dict[str, list[str]]
    """Ids of the questions of each prompt set."""
    sweep_questions: list[str]
    """Ids of the held-out questions that K was chosen on."""


class Versions(Part):
    specflow: str
    engine: str
    """Digest of the code that generates."""
    python: str
    torch: str
    transformers: str


class TargetIdentity(Part):
    """The target, as target.json has it."""

    source: str
    revision: str
    digest: str
    """sha256 over weights and configuration."""
    tokenizer_digest: str
    template_digest: str
    dtype: str


class Identity(Part):
    """What a benchmark was run on and with: without it its numbers mean nothing."""

    cpu: str
    """Model name."""
    cpu_cores: int | None
    torch_threads: int
    load_average_at_start: float
    """Processes that wanted to run, over the last minute."""
    device: str
    """Name of the GPU, or `cpu`."""
    platform: str
    versions: Versions
    target: TargetIdentity
    draft_digest: str | None
    """sha256 of the draft's weights; None where no draft ran."""
    git_commit: str | None
    """Of the project folder, `+changes` behind it where tracked files differ; None outside a repository."""
    draft_dtype: str | None = None
    """Dtype of the draft's products; None where no EAGLE-3 draft ran."""


class Divergence(Part):
    """Where the first output that is not the target's own parts from it."""

    set: str
    question_id: str
    turn: int
    sample: int
    repeat: int
    position: int
    """Index among the generated tokens."""
    expected: int | None
    """The target's token id; None where its output ends before."""
    got: int | None
    """The draft run's token id; None where its output ends before."""


class EngineResult(Part):
    """One engine's acceptance, and its speed over the pairs with the target alone."""

    num_requests: int
    """Turns of questions, each counted once however often it was repeated."""
    num_questions: int
    num_tokens: int
    """Generated over all repeats."""
    num_steps: int
    """Verifications over all repeats."""
    acceptance_length: float | None
    """Tokens emitted per verification, the target's own included; pooled over steps."""
    acceptance_length_ci: Interval | None
    acceptance_length_macro: float | None
    """Mean over requests of each one's acceptance length."""
    draft_acceptance_rate: float | None
    """Accepted over drafted tokens; of a tree, of all its nodes."""
    drafted_per_step: float | None
    """Mean number of drafted tokens, of a tree nodes."""
    survival: list[float]
    """Share of all steps whose first i drafted tokens were accepted, i = 1..K."""
    conditional: list[float]
    """Survival at i over that at i - 1."""
    histogram: dict[int, int]
    """Steps by acceptance length."""
    tok_s: float | None
    """Over whole requests, prefill included."""
    baseline_tok_s: float | None
    """Of the target alone on the same requests."""
    speedup: float | None
    """`tok_s` over the target's, as a ratio of sums over pairs."""
    speedup_ci: Interval | None
    speedup_mean_of_ratios: float | None
    """Mean over pairs of each one's ratio."""
    decode_tok_s: float | None
    """Without the prefill and the token it yields."""
    baseline_decode_tok_s: float | None
    decode_speedup: float | None


class ReferenceRow(Part):
    """Another way of drafting through the same verifier, on the same prompts."""

    num_requests: int
    acceptance_length: float
    tok_s: float
    baseline_tok_s: float | None
    speedup: float | None
    speedup_ci: Interval | None
    decode_speedup: float | None
    lossless: bool | None
    """None under sampling."""


class SetResult(EngineResult):
    """One prompt set, or several pooled."""

    lossless: bool | None
    """Whether every output is the target's own, token for token; None under sampling."""
    lossless_rate: float | None
    """Share of the runs of which that is true."""
    first_divergence: Divergence | None
    baseline_repeats_equal: bool | None
    """Whether the target alone answered each request alike in every repeat."""
    num_length_limited: int
    """Requests that ended at max_new_tokens."""
    by_category: dict[str, EngineResult]
    by_turn: dict[int, EngineResult]
    """By place of the turn, from 0."""
    by_sample: dict[int, EngineResult]
    references: dict[str, ReferenceRow]
    """By name, of those of config_bench.REFERENCES that ran."""


class Cost(Part):
    """What a step costs in the benchmark's own requests, and the decode speedup that this predicts."""

    t_target_ms: float | None
    """A step of the target alone."""
    t_verify_ms: float | None
    """The target's part of a step with the draft."""
    t_draft_ms: float | None
    """The draft's part."""
    predicted_speedup: float | None
    """Acceptance length x t_target / (t_draft + t_verify)."""
    outside_share: float | None
    """Share of the decode time that lies in no model call."""


class RepeatSpeed(Part):
    repeat: int
    num_pairs: int
    baseline_tok_s: float
    tok_s: float
    speedup: float | None


class Drift(Part):
    """Whether the machine stayed the same over the run, by the target's own speed."""

    span_s: float | None
    """From the first request's start to the last one's end."""
    baseline_per_hour: float | None
    """Relative change of the target's tokens per second in an hour."""
    baseline_change: float | None
    """The same over the whole run."""
    baseline_change_ci: Interval | None
    by_repeat: list[RepeatSpeed]
    most_at_once: int
    """Most requests under way at the same time: 1 for one worker, 0 where the times are not known."""


Concluded = Literal["pays", "does not pay", "no conclusion"]


class Conclusion(Part):
    """What the benchmark comes to."""

    conclusion: Concluded
    sentence: str
    reasons: list[str]
    """Why no conclusion can be drawn; empty where one can."""
    notes: list[str]
    """What a reader should know besides."""


class Statistics(Part):
    """What is computed from records.jsonl alone."""

    sets: dict[str, SetResult]
    """By prompt set, in the order of the records."""
    overall: SetResult
    """All sets pooled."""
    cost: Cost
    drift: Drift
    verdict: str
    """`conclusion.sentence`."""
    conclusion: Conclusion


class Conditions(Part):
    """What of the machine counts against a conclusion."""

    busy_share: float | None = None
    """Share of all cores' time that other processes took as the run began."""
    shared_cpu: bool = False
    """Whether several workers measured on one CPU at the same time."""


class SweepPoint(Part):
    """A chain of K on the held-out questions."""

    num_speculative_tokens: int
    acceptance_length: float
    tok_s: float
    speedup: float | None


class DraftCosts(Part):
    """Milliseconds of the draft's parts. `ingest` and `step` are a chain's: 2 rows, then 1."""

    ingest: float
    """From rows of verified tokens to the first drafted token."""
    step: float
    """Each further drafted token."""
    ingest_by_rows: dict[int, float]
    step_by_rows: dict[int, float]
    """By rows of a level: 1 in a chain, top_k in a tree."""
    tree_by_rows: dict[int, float]
    """What a tree's proposal takes beyond that whatever its depth, by top_k."""


class StepCosts(Part):
    """What the parts of a step cost when measured alone."""

    target_ms: float
    """A plain step."""
    verify_ms: dict[int, float]
    """A forward over n tokens, its logits and the verdict, by n."""
    draft_ms: DraftCosts
    context: int
    """Tokens before the step."""


class BatchDivergence(Part):
    """Where the first answer in a batch that is not the target's own parts from it."""

    request: int
    """Place among the prompts."""
    position: int
    expected: int | None
    got: int | None
    margin: float | None
    """Logits by which the target prefers its token when it reads the request alone: next to nothing is rounding."""


class BatchRow(Part):
    """Several requests at once, in process, by a chain."""

    batch_size: int
    num_requests: int
    num_speculative_tokens: int
    tok_s: float
    baseline_tok_s: float
    speedup: float
    acceptance_length: float | None
    lossless_rate: float | None
    """Share of answers equal to the target's own at the same batch size; None under sampling."""
    first_divergence: BatchDivergence | None


class Accuracy(Part):
    """Right answers of one prompt set, judged against its references."""

    kind: str
    """How an answer is judged: `final number` or `tests`."""
    num_questions: int
    num_answers: int
    """Pairs of answers, repeats counted."""
    baseline: float | None
    """Share of right answers of the target alone."""
    draft: float | None
    """Share of right answers with the draft."""
    difference: float | None
    """Draft less baseline, over pairs."""
    difference_ci: Interval | None
    only_baseline_right: int
    only_draft_right: int
    num_unreadable: dict[str, int]
    """Answers without a result that could be judged, by engine."""
    num_length_limited: dict[str, int]
    """Answers that ended at max_new_tokens, by engine."""


class About(Part):
    """What was measured, and on what."""

    schema_version: Literal[1] = SCHEMA_VERSION
    family: str
    """Family, or name of the target."""
    settings: Settings
    identity: Identity


class Summary(Statistics, About):
    """bench/summary.json."""

    conditions: Conditions
    num_speculative_tokens: int
    """K of the chain, or the tree's depth; 0 without a draft."""
    tree: Tree | None
    """None: a chain."""
    sweep: list[SweepPoint]
    """What K was chosen from; empty where it was given."""
    cost_model: StepCosts | None
    batch: list[BatchRow]
    accuracy: dict[str, Accuracy] | None
    """By prompt set."""
    notes: list[str]
    """What was assumed of a foreign draft."""
    num_skipped_turns: int
    """Turns that were not asked because their history is over the context."""
    stock_generate_tok_s: float | None
    """transformers' own generate() on some of the prompts."""
    baseline_over_stock: float | None
    """Speed of the target alone over it, on the same prompts."""
    baseline_equals_stock: bool | None
    """Whether both gave the same tokens; None under sampling."""


def read_summary(file: Path, *, made_by: str) -> Summary:
    """Raises UserError in one line for a file that is missing, damaged or of another version; `made_by` makes it."""
    return read_result(Summary, file, version=SCHEMA_VERSION, what="benchmark", made_by=made_by)


def family_summary(paths: Paths) -> Summary:
    """The benchmark of a family."""
    return read_summary(paths.bench / "summary.json", made_by=f"dvc repro bench@{paths.family}")
