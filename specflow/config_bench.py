"""What a benchmark can be asked to do: `families.F.bench` of params.yaml, and the options of `specflow bench --output`.

Imports nothing heavy, as the whole schema does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from specflow.schema import Count, Fraction, NonNegative, Section, Seed, Switch, Whole

HELDOUT = "heldout"
"""The prompt set of the family's own eval split."""
REFERENCES = ("lookup", "oracle", "null", "assistant")
"""Engines beside the draft: n-gram drafting, always right, always wrong, an independent draft model."""


Mode = Literal["both", "baseline", "draft"]
"""Which sides of a benchmark run: one alone is no comparison, so no speedup is claimed."""


class DynamicTree(Section):
    """EAGLE-2's tree: grown level by level where the draft is surest, then cut to its best nodes."""

    total_token: Annotated[Count, Field(ge=2, le=4096)]
    """Nodes that the target verifies at once, the last verified token as root among them: EAGLE's name and SGLang's
    num_draft_tokens. At most total_token - 1 tokens are drafted.
    """
    depth: Annotated[Count, Field(le=64)]
    """Most drafted tokens on a path: SGLang's num_steps. EAGLE's and AngelSlim's --depth is one less."""
    top_k: Annotated[Count, Field(le=1024)]
    """Branches kept at each level (SGLang's eagle_topk)."""

    @model_validator(mode="after")
    def _check(self) -> DynamicTree:
        if self.depth > self.total_token - 1:
            raise ValueError(
                f"depth {self.depth} cannot be reached with total_token {self.total_token}, whose root is no draft: "
                "lower depth or raise total_token"
            )
        return self


class StaticTree(Section):
    """The same tree at every step."""

    branches: list[list[Annotated[Whole, Field(le=1023)]]] = Field(min_length=1, max_length=4095)
    """A node by the ranks of its tokens from the root on: [[0], [1], [0, 0]] is the best token, the second best, and
    the best one behind the best.
    """

    @model_validator(mode="after")
    def _check(self) -> StaticTree:
        paths = [tuple(branch) for branch in self.branches]
        for path in paths:
            if not path:
                raise ValueError("branches holds an empty path, which is the root: leave it out")
            if paths.count(path) > 1:
                raise ValueError(f"branches holds {list(path)} twice")
            if len(path) > 1 and path[:-1] not in paths:
                raise ValueError(f"branches holds {list(path)} but not {list(path[:-1])}, which it hangs on: add it")
        return self

    @property
    def depth(self) -> int:
        return max(map(len, self.branches))

    @property
    def total_token(self) -> int:
        return len(self.branches) + 1


TREE_KINDS = ("dynamic tree", "static tree")
"""As the tree's two forms stand in the place of a validation error, where no key is meant by them."""


def _kind_of_tree(value: Any) -> str:
    static = isinstance(value, StaticTree) or (isinstance(value, dict) and "branches" in value)
    return TREE_KINDS[static]


Tree = Annotated[
    Annotated[DynamicTree, Tag(TREE_KINDS[0])] | Annotated[StaticTree, Tag(TREE_KINDS[1])], Discriminator(_kind_of_tree)
]


class BenchServe(Section):
    """The benchmark again through inference servers, target alone and target + draft, with the same prompts and K."""

    engine: Literal["vllm", "sglang", "openai"] = "vllm"
    """`openai`: any OpenAI-compatible server at the two URLs. It tells no acceptance, and where it sends no token ids
    outputs are compared as text.
    """
    baseline_url: str | None = None
    """Base URL of a server of the target alone that somebody else started; both URLs or neither. Without them two are
    started in turn, by `serve`.
    """
    draft_url: str | None = None
    """The same server build and flags with the exported draft."""
    concurrency: list[Annotated[Count, Field(le=2**16)]] = Field(default=[1, 2, 4, 8, 16], min_length=1)
    """Requests in flight at a time, ascending."""
    num_prompts: Count | None = None
    """Questions per set, taken evenly over the set; default those of the benchmark in process."""
    repeats: Annotated[Count, Field(ge=2, le=1000)] = 2
    """Blocks of each server at each concurrency, in the order A B B A."""

    @model_validator(mode="after")
    def _check(self) -> BenchServe:
        if self.concurrency != sorted(set(self.concurrency)):
            raise ValueError(f"concurrency {self.concurrency} must ascend")
        if (self.baseline_url is None) != (self.draft_url is None):
            raise ValueError("give baseline_url and draft_url, or neither: a benchmark takes two servers")
        if self.engine == "openai" and self.draft_url is None:
            raise ValueError("engine openai starts no server: give baseline_url and draft_url")
        return self


class Bench(Section):
    prompt_sets: list[str] = Field(default=[HELDOUT], min_length=1)
    """Names of `prompt_sets`, or `heldout` (prompts of the eval split)."""
    num_prompts: Count = 20
    """Questions per set, taken evenly over the set."""
    max_new_tokens: Annotated[Count, Field(le=2**20)] = 128
    """Per turn, the same for every engine."""
    max_turns: Annotated[Count, Field(le=1000)] = 2
    """Turns of a question that are asked, each with the answers so far as history."""
    num_speculative_tokens: Annotated[Count, Field(le=64)] | Literal["auto"] = "auto"
    """K of a chain; `auto` takes the fastest of `sweep` on held-out prompts, never on the benchmark. Not read where
    `tree` is set.
    """
    sweep: list[Annotated[Count, Field(le=64)]] = Field(default=[1, 2, 3, 4], min_length=1)
    sweep_prompts: Count = 4
    tree: Tree | None = None
    """Draft a tree: {total_token, depth, top_k} grows one by the draft's probabilities, {branches} is always the same.
    null: a chain.
    """
    temperature: Annotated[NonNegative, Field(le=100.0)] = 0.0
    """0 is greedy."""
    top_p: Annotated[Fraction, Field(gt=0.0)] = 1.0
    """Sampling keeps the likeliest tokens that together reach this probability; 1: all."""
    top_k: Whole = 0
    """Sampling keeps this many of the likeliest tokens; 0: all."""
    num_samples: Annotated[Count, Field(le=1000)] = 1
    """Answers to each question, each with a seed and a history of its own."""
    repeats: Annotated[Count, Field(ge=3, le=1000)] = 3
    """Passes over every prompt; the order of the engines alternates."""
    draft_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which the draft's products run. `auto`: on a GPU the target's; on a CPU bfloat16 where the processor
    multiplies it natively. It decides what is accepted, never what comes out; to compare step by step with a server,
    take the server's.
    """
    prompt_lookup: Switch = True
    """Also run n-gram drafting through the same verifier, as a reference row."""
    bounds: Switch = True
    """Also run a draft that is always right and one that is always wrong: what lies between them and the ideal is the
    harness's own cost. Greedy only.
    """
    assistant: str | None = None
    """Also draft with this whole model: a folder, or a source as in target.source. Its tokenizer is the target's."""
    stock_generate: Switch = True
    """Also time transformers' own generate() on some prompts, as a reference row."""
    batch_sizes: list[Annotated[Count, Field(le=4096)]] = []
    """Also answer this many requests at once, by a chain, ascending."""
    cost_tokens: list[Annotated[Count, Field(le=4096)]] = [1, 2, 3, 4, 8, 16, 32, 64]
    """Rows of a verification whose time is measured; empty: none."""
    accuracy: list[str] = []
    """Prompt sets whose answers are scored against their references."""
    execute_code: Switch = False
    """Whether scoring may run the code that the model wrote, in a subprocess with limits."""
    serve: BenchServe | None = None
    """Also measure through inference servers; null: in process only."""
    seed: Seed = 0

    @field_validator("tree", mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, dict | DynamicTree | StaticTree):
            raise ValueError(f"{value!r} is no tree: give total_token, depth and top_k, or branches")
        return value

    @model_validator(mode="after")
    def _check(self) -> Bench:
        if self.greedy:
            if self.num_samples > 1:
                raise ValueError(
                    f"num_samples {self.num_samples} at temperature 0 would repeat one answer: "
                    "set a temperature above 0, or num_samples 1"
                )
            if self.top_p < 1.0 or self.top_k > 0:
                raise ValueError(
                    f"top_p {self.top_p} and top_k {self.top_k} change nothing at temperature 0: "
                    "set a temperature above 0, or leave them at 1 and 0"
                )
        if self.batch_sizes != sorted(set(self.batch_sizes)):
            raise ValueError(f"batch_sizes {self.batch_sizes} must ascend")
        if self.batch_sizes and self.tree is not None:
            raise ValueError("batch_sizes are measured with a chain: leave tree null, or batch_sizes empty")
        if self.serve is not None and (self.tree is not None or self.top_p < 1.0 or self.top_k > 0):
            raise ValueError("serve measures a chain, at a temperature alone: leave tree, top_p and top_k as they are")
        for name in self.accuracy:
            if name not in self.prompt_sets:
                raise ValueError(f"accuracy names {name!r}, which prompt_sets {self.prompt_sets} does not have")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def sweeps(self) -> bool:
        """Whether K is chosen on held-out prompts first."""
        return self.tree is None and self.num_speculative_tokens == "auto"
