"""The draft's first weights: random, parts of the target, or an earlier draft."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specflow.config import Family
from specflow.data.vocab import read_vocab
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.targets.model import TargetFacts, load_lm_head, load_tensor, tensor_names


def draft_config(facts: TargetFacts, family: Family, aux_layer_ids: list[int], draft_vocab_size: int) -> Eagle3Config:
    """Shape of a new draft: the target's own layer, one of it, over the draft vocabulary."""
    return Eagle3Config(
        hidden_size=facts.hidden_size,
        target_hidden_size=facts.hidden_size,
        intermediate_size=family.train.intermediate_size or facts.intermediate_size,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        rms_norm_eps=facts.rms_norm_eps,
        hidden_act=facts.hidden_act,
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
        return _continued(Path(family.train.init_from), facts, d2t, t2d, aux_layer_ids)
    draft = Eagle3Draft(draft_config(facts, family, aux_layer_ids, len(d2t)))
    draft.d2t.copy_(d2t)
    draft.t2d.copy_(t2d)
    copy_from_target(draft, facts, cache, family.train.init_from_target)
    return draft


def _continued(folder: Path, facts: TargetFacts, d2t: Tensor, t2d: Tensor, aux_layer_ids: list[int]) -> Eagle3Draft:
    """An exported draft over this run's vocabulary: its head rows are matched by token, new tokens start at zero."""
    from specflow.export.eagle3 import load_export

    old = load_export(folder)
    c = old.config
    got = (c.vocab_size, c.target_hidden_size, c.aux_layer_ids)
    expected = (facts.vocab_size, facts.hidden_size, aux_layer_ids)
    if got != expected:
        raise UserError(
            f"train.init_from {folder}: (vocabulary, width, aux layers) are {got}, this target's are {expected}"
        )
    draft = Eagle3Draft(c.model_copy(update={"draft_vocab_size": len(d2t)}))
    by_token = torch.zeros(c.vocab_size, c.hidden_size)
    by_token[old.t2d] = old.lm_head.weight.detach()
    weights = {
        name: tensor for name, tensor in old.state_dict().items() if name not in ("d2t", "t2d", "lm_head.weight")
    }
    draft.load_state_dict(weights | {"d2t": d2t, "t2d": t2d, "lm_head.weight": by_token[t2d]})
    return draft


def copy_from_target(draft: Eagle3Draft, facts: TargetFacts, cache: Path, parts: list[str]) -> None:
    """Copy the named parts from the target's last layer, final norm and head, in place."""
    names = tensor_names(facts, cache)
    last = f"layers.{facts.num_hidden_layers - 1}."
    norm_offset = 1.0 if facts.model_type.startswith("gemma") else 0.0  # Gemma stores its norm weights minus one

    def last_layer(suffix: str) -> Tensor:
        found = [name for name in names if name.endswith(last + suffix)]
        if len(found) != 1:
            raise UserError(
                f"target {facts.source} has no single {last}{suffix}: take that part out of train.init_from_target"
            )
        return load_tensor(facts, cache, found[0])

    sources = {
        "mlp": lambda: {f"{p}_proj": last_layer(f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")},
        "o_proj": lambda: {"o_proj": last_layer("self_attn.o_proj.weight")},
        "norm": lambda: {"norm": load_tensor(facts, cache, _final_norm(names, facts)) + norm_offset},
        "lm_head": lambda: {"lm_head": load_lm_head(facts, cache)[draft.t2d.cpu()]},
    }
    for part in parts:
        for module, weight in sources[part]().items():
            own = getattr(draft, module).weight
            if own.shape != weight.shape:
                raise UserError(
                    f"train.init_from_target {part}: target has {list(weight.shape)}, draft {list(own.shape)}: "
                    f"take {part} out of it"
                )
            with torch.no_grad():
                own.copy_(weight)


def _final_norm(names: list[str], facts: TargetFacts) -> str:
    prefix = facts.embedding_key.removesuffix("embed_tokens.weight")
    if f"{prefix}norm.weight" not in names:
        raise UserError(f"target {facts.source} has no {prefix}norm.weight: take norm out of train.init_from_target")
    return f"{prefix}norm.weight"
