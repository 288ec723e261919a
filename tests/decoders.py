"""Tiny random models for tests of decoding, built in memory: a Llama and an EAGLE-3 draft that fits it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

AUX = [0, 1, 2]
_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def make_llama(
    vocab_size: int, *, seed: int = 0, num_layers: int = 4, spread: float = 1.5, noise: float = 0.0
) -> LlamaForCausalLM:
    """Weights so wide that the greedy choice depends on the context; a smaller `spread` of the head flattens it.

    With `noise`, relative to the weights, a model that often agrees with the one without.
    """
    config = LlamaConfig(
        **_WIDTH,
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = spread if "lm_head" in name else 1.5
            weight.normal_(0.0, 1.0 if "embed" in name else scale / weight.shape[1] ** 0.5, generator=generator)
    for weight in model.parameters():
        if weight.ndim == 2 and noise > 0:
            weight += torch.randn(weight.shape, generator=generator) * weight.std() * noise
    return model


def make_target(model: LlamaForCausalLM, *, num_rows: int = 1, max_length: int = 160) -> CachedTarget:
    return CachedTarget(optimise_for_inference(model), num_rows=num_rows, max_length=max_length, aux_layer_ids=AUX)


def make_draft(vocab_size: int, *, seed: int = 1, **changes: object) -> Eagle3Draft:
    """A random draft over the whole vocabulary."""
    config = Eagle3Config(
        **_WIDTH,
        target_hidden_size=_WIDTH["hidden_size"],
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_parameters=_ROPE,
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size,
        aux_layer_ids=AUX,
    ).model_copy(update=changes)
    draft = Eagle3Draft(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5, generator=generator)
    return draft
