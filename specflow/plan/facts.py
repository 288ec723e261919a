"""What a plan starts from: the shape of a target and the speed of a device, as plain numbers.

Owns the public shapes of the recipes' targets (taken when nothing has been fetched) and the table of assumed devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; dense ones have one expert."""

    name: str
    hidden_size: int
    intermediate_size: int
    """Width of a dense MLP, which is what the draft takes."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_experts: int = 1
    experts_per_token: int = 1
    expert_size: int | None = None
    """Width of one expert's MLP; None: dense."""

    @property
    def table_parameters(self) -> int:
        """Of the embedding table, and of the output head where it is not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """q, k, v and o of all layers."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.num_hidden_layers * self.hidden_size * heads * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        """MLPs of all layers, every expert counted (gate, up, down), routers with them."""
        if self.expert_size is None:
            return self.num_hidden_layers * 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.expert_size
        return self.num_hidden_layers * self.num_experts * (expert + self.hidden_size)

    @property
    def active_mlp_parameters(self) -> int:
        """MLPs that one token runs through."""
        if self.expert_size is None:
            return self.mlp_parameters
        expert = 3 * self.hidden_size * self.expert_size
        return self.num_hidden_layers * (self.experts_per_token * expert + self.num_experts * self.hidden_size)

    @property
    def num_parameters(self) -> int:
        """All weights but norms and biases, which are below 0.01 %."""
        tables = self.table_parameters * (1 if self.tie_word_embeddings else 2)
        return tables + self.attention_parameters + self.mlp_parameters

    @property
    def decoder_parameters(self) -> int:
        """Weights that a token is multiplied with in the layers: no embedding, no head."""
        return self.attention_parameters + self.active_mlp_parameters

    def read_parameters(self, num_tokens: int) -> float:
        """Weights read by one forward of `num_tokens` tokens, head included; of the experts those that some token
        draws, 1 - (1 - k/E)^n of them where routing is uniform.
        """
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens if self.expert_size else 0.0
        return self.table_parameters + self.attention_parameters + self.mlp_parameters * (1 - missed)

    def attention_flops(self, context: float) -> float:
        """Of one token that attends `context` tokens, in all layers: two products of 2 FLOPs each."""
        return 4.0 * context * self.num_attention_heads * self.head_dim * self.num_hidden_layers

    def key_value_bytes(self, itemsize: int) -> int:
        """Of one cached token, all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


SHAPES = {
    shape.name.lower(): shape
    for shape in (
        Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256),
        Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936),
        Shape("Qwen3-30B-A3B", 2048, 6144, 48, 32, 4, 128, 151936, False, 128, 8, 768),
        Shape("Qwen3-235B-A22B", 4096, 12288, 94, 64, 4, 128, 151936, False, 128, 8, 1536),
        Shape("gemma-3-270m", 640, 2048, 18, 4, 1, 256, 262144, True),
        Shape("gemma-3-4b", 2560, 10240, 34, 8, 4, 256, 262208, True),
        Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, True),
    )
}
"""Public facts, from the config.json of each model on the hub. Sliding windows are not known: caches count whole."""


def shape_named(reference: str) -> Shape | None:
    """The built-in shape whose name stands in a source reference (`hf:Qwen/Qwen3-8B@main`), hyphens aside; the longest
    name wins.
    """
    found = [shape for name, shape in SHAPES.items() if name.replace("-", "") in reference.lower().replace("-", "")]
    return max(found, key=lambda shape: len(shape.name), default=None)


def shape_of_config(config: Mapping[str, Any], name: str) -> Shape:
    """Shape by a Hugging Face config.json (of its text part, where it has several).

    Raises UserError naming a key that is missing. Shared experts are not counted.
    """
    text = config.get("text_config", config)
    experts = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in text), None)
    try:
        heads = text["num_attention_heads"]
        return Shape(
            name=name,
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocab_size=text["vocab_size"],
            tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            num_experts=experts or 1,
            experts_per_token=text["num_experts_per_tok"] if experts else 1,
            expert_size=(text.get("moe_intermediate_size") or text["intermediate_size"]) if experts else None,
        )
    except KeyError as error:
        raise UserError(f"config of {name} has no {error}: give the config.json of a decoder with --config") from None


def read_config(path: Path) -> Shape:
    """Shape by the file of a config.json, or by a built-in name. Raises UserError where it is neither."""
    if (shape := SHAPES.get(str(path).lower())) is not None:
        return shape
    try:
        return shape_of_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, json.JSONDecodeError) as error:
        known = ", ".join(shape.name for shape in SHAPES.values())
        raise UserError(
            f"{path} is no readable config.json ({error}): give that of the target, or one of {known}"
        ) from None


@dataclass(frozen=True)
class Device:
    """What a device can do, and which share of it the stages are assumed to reach."""

    name: str
    flops: float
    """Peak dense FLOP/s in the dtype that the target runs in."""
    bandwidth: float
    """Peak bytes/s of its memory."""
    memory_bytes: float
    mfu: float
    """Share of `flops` reached by prefill, capture and training."""
    mbu: float
    """Share of `bandwidth` reached by decoding."""
    layer_s: float
    """Seconds that a forward takes per layer beyond its arithmetic: kernel launches of transformers without graphs."""
    is_cpu: bool = False


DEVICES = {
    device.name: device
    for device in (
        Device("h200", 989e12, 4.8e12, 141e9, 0.4, 0.5, 0.8e-3),
        Device("h100", 989e12, 3.35e12, 80e9, 0.4, 0.5, 0.8e-3),
        Device("a100", 312e12, 2.04e12, 80e9, 0.4, 0.5, 0.8e-3),
        Device("l40s", 362e12, 0.864e12, 48e9, 0.4, 0.5, 0.8e-3),
        Device("cpu", 398e9, 42e9, 0.0, 0.5, 0.5, 0.0, is_cpu=True),
    )
}
"""GPUs: bf16 dense peaks of the data sheets; shares and launch time assumed, not measured. cpu: two cores with AVX-512,
oneDNN's fp32 product and memory rate as measured for docs/training.md."""
