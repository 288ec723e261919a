"""The target's final norm by itself, for engines that hand out the residual stream before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from specflow.errors import UserError
from specflow.targets.model import TargetFacts, decoder_of, load_tensor, tensor_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_final_norm(facts: TargetFacts, cache: Path) -> nn.Module:
    """The model's own norm module with its weight, on CPU in the target's dtype; the other weights are not read.

    Its class comes from transformers' model of that architecture, so whether the weight is stored minus one (Gemma) or
    multiplied before or after the cast is not decided here. Raises UserError where the norm is not one module with one
    weight that the checkpoint has.
    """
    norm = getattr(decoder_of(_skeleton(facts, cache)), "norm", None)
    key = facts.embedding_key.removesuffix("embed_tokens.weight") + "norm.weight"
    known = (
        isinstance(norm, nn.Module)
        and [name for name, _ in norm.named_parameters()] == ["weight"]
        and not list(norm.buffers())
        and facts.embedding_key.endswith("embed_tokens.weight")
        and key in tensor_names(facts, cache)
    )
    if not known:
        raise UserError(
            f"the final norm of {facts.architecture} is not one that specflow knows (a module `norm` with one weight "
            f"{key}): set extract.engine to transformers"
        )
    assert isinstance(norm, nn.Module)
    norm.to_empty(device="cpu")
    norm.load_state_dict({"weight": load_tensor(facts, cache, key)})
    return norm.to(getattr(torch, facts.dtype)).eval().requires_grad_(False)


def _skeleton(facts: TargetFacts, cache: Path) -> PreTrainedModel:
    """The model's modules without memory for their weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = facts.trust_remote_code
    config = AutoConfig.from_pretrained(facts.path(cache), trust_remote_code=trust)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return model
