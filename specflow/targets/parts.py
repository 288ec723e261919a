"""Parts of the target that a draft can start as (train.init_from_target): where they are, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from specflow.errors import UserError

if TYPE_CHECKING:
    from specflow.config import Train
    from specflow.targets.model import TargetFacts
    from specflow.targets.weights import StoredTensor

_LAST_LAYER = {
    "mlp": {name: f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
    "o_proj": {"o_proj": "self_attn.o_proj.weight"},
}
"""Tensors of the target's last layer by the module of the draft that starts as them."""


def part_keys(part: str, facts: TargetFacts, names: Collection[str]) -> dict[str, str]:
    """Names of the checkpoint's tensors of a part, by the draft's module. Raises UserError where there are none."""
    if part == "lm_head":
        return {"lm_head": facts.lm_head_key}
    if part == "norm":
        wanted = {"norm": facts.embedding_key.removesuffix("embed_tokens.weight") + "norm.weight"}
        found = {module: [name] if name in names else [] for module, name in wanted.items()}
    else:
        last = f"layers.{facts.num_hidden_layers - 1}."
        wanted = {module: last + name for module, name in _LAST_LAYER[part].items()}
        found = {module: [name for name in names if name.endswith(end)] for module, end in wanted.items()}
    for module, keys in found.items():
        if len(keys) != 1:
            raise UserError(
                f"target {facts.source} has no single {wanted[module]}: take {part} out of train.init_from_target"
            )
    if part == "mlp" and facts.hidden_act != "silu" and "gelu" not in facts.hidden_act:
        raise UserError(
            f"target's activation is {facts.hidden_act}, the draft's silu: take mlp out of train.init_from_target"
        )
    return {module: keys[0] for module, keys in found.items()}


def check_parts(train: Train, facts: TargetFacts, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError for a part of train.init_from_target that the target lacks, has packed or of another shape."""
    hidden, attention = facts.hidden_size, facts.num_attention_heads * facts.head_dim
    width = train.intermediate_size or facts.intermediate_size
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shapes |= {"o_proj": (hidden, attention), "norm": (hidden,), "lm_head": (facts.vocab_size, hidden)}
    for part in train.init_from_target:
        for module, key in part_keys(part, facts, stored).items():
            tensor = stored[key]
            if tensor.shape != shapes[module] or not tensor.is_float:
                raise UserError(
                    f"train.init_from_target {part}: target has {key} as {tensor.dtype} {list(tensor.shape)}, the "
                    f"draft {list(shapes[module])} of floats: take {part} out of it"
                )
