"""The draft's first weights: random, parts of the target, or an earlier draft."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from specflow.config import Family, Train
from specflow.data.vocab import read_vocab
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.files import sha256_file
from specflow.paths import outside
from specflow.targets.model import TargetFacts, load_lm_head, load_tensor, tensor_names
from specflow.targets.parts import part_keys

logger = logging.getLogger("specflow")
GELU_AS_SILU = 1.702


def draft_config(facts: TargetFacts, family: Family, aux_layer_ids: list[int], draft_vocab_size: int) -> Eagle3Config:
    """Shape of a new draft: the target's own layer, one of it, over the draft vocabulary.

    Its activation is SiLU whatever the target's: it is a Llama layer, and servers load no other kind.
    """
    return Eagle3Config(
        hidden_size=facts.hidden_size,
        target_hidden_size=facts.hidden_size,
        intermediate_size=family.train.intermediate_size or facts.intermediate_size,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        rms_norm_eps=facts.rms_norm_eps,
        hidden_act="silu",
        max_position_embeddings=facts.max_position_embeddings,
        rope_parameters=facts.rope_parameters,
        vocab_size=facts.vocab_size,
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=aux_layer_ids,
    )


def initial_draft(
    facts: TargetFacts, family: Family, cache: Path, vocab_folder: Path, aux_layer_ids: list[int]
) -> Eagle3Draft:
    """Build the draft that training starts from, seeded by train.seed, on CPU in fp32."""
    d2t, t2d = read_vocab(vocab_folder)
    torch.manual_seed(family.train.seed)
    if family.train.init_from is not None:
        return _continued(family.train, facts, cache, d2t, t2d, aux_layer_ids)
    draft = Eagle3Draft(draft_config(facts, family, aux_layer_ids, len(d2t)))
    draft.d2t.copy_(d2t)
    draft.t2d.copy_(t2d)
    copy_from_target(draft, facts, cache, family.train.init_from_target)
    return draft


def _continued(
    train: Train, facts: TargetFacts, cache: Path, d2t: Tensor, t2d: Tensor, aux_layer_ids: list[int]
) -> Eagle3Draft:
    """An earlier draft over this run's vocabulary: its head rows are matched by token, new tokens start at zero.

    Without epochs it stays as it is.
    """
    from specflow.export.imports import read_draft, weights_file

    folder = outside(str(train.init_from))
    old, notes = read_draft(folder, facts, cache)
    digest = sha256_file(weights_file(folder))
    if train.init_from_sha256 is not None and train.init_from_sha256.lower() != digest:
        raise UserError(
            f"train.init_from {folder} has weights of sha256 {digest}, expected {train.init_from_sha256}: name the "
            "folder that is meant, or correct train.init_from_sha256"
        )
    for note in notes:
        logger.info("init_from: %s", note)
    c = old.config
    if c.aux_layer_ids != aux_layer_ids:
        raise UserError(
            f"train.init_from {folder} reads aux layers {c.aux_layer_ids}, extract.aux_layer_ids are {aux_layer_ids}: "
            "set extract.aux_layer_ids to the draft's"
        )
    if train.epochs == 0:
        return old
    draft = Eagle3Draft(c.model_copy(update={"draft_vocab_size": len(d2t)}))
    by_token = torch.zeros(c.vocab_size, c.hidden_size)
    by_token[old.d2t + torch.arange(len(old.d2t))] = old.lm_head.weight.detach()  # in d2t's order, whatever it is
    weights = {
        name: tensor for name, tensor in old.state_dict().items() if name not in ("d2t", "t2d", "lm_head.weight")
    }
    draft.load_state_dict(weights | {"d2t": d2t, "t2d": t2d, "lm_head.weight": by_token[t2d]})
    return draft


def copy_from_target(draft: Eagle3Draft, facts: TargetFacts, cache: Path, parts: list[str]) -> None:
    """Copy the named parts from the target's last layer, final norm and head, in place."""
    names = tensor_names(facts, cache)
    norm_offset = 1.0 if facts.model_type.startswith("gemma") else 0.0  # Gemma stores its norm weights minus one
    # gelu(x) is close to x sigmoid(1.702 x) = silu(1.702 x) / 1.702
    slope = GELU_AS_SILU if "gelu" in facts.hidden_act else 1.0

    def first_weight(module: str, key: str) -> Tensor:
        if module == "lm_head":
            return load_lm_head(facts, cache)[draft.t2d.cpu()]
        weight = load_tensor(facts, cache, key)
        if module == "norm":
            return weight + norm_offset
        return weight * slope if module == "gate_proj" else weight / slope if module == "up_proj" else weight

    for part in parts:
        for module, key in part_keys(part, facts, names).items():
            weight = first_weight(module, key)
            own = getattr(draft, module).weight
            if own.shape != weight.shape:
                raise UserError(
                    f"train.init_from_target {part}: target has {list(weight.shape)}, draft {list(own.shape)}: "
                    f"take {part} out of it"
                )
            with torch.no_grad():
                own.copy_(weight)
