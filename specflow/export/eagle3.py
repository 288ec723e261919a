"""Plain Hugging Face EAGLE-3 form, the one that vLLM and SGLang load, and its load contract.

Tensor names and shapes follow vLLM's `llama_eagle3.py` loader and SGLang's (both accept `midlayer.` for the one layer;
vLLM ignores `t2d`). Neither complains about what is missing: a draft without `d2t` or with a forgotten norm flag
serves at acceptance length 1. So every flag is written, layer ids stand at the top level, and an export is checked
before it counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.files import atomic_path, read_json, write_json
from specflow.targets.model import TargetFacts

_LAYER = {
    **{f"{p}_proj": f"self_attn.{p}_proj" for p in ("q", "k", "v", "o")},
    **{f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
    **{norm: norm for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
}
"""Our modules of the one decoder layer -> their names below `midlayer.` (or `layers.0.`)."""
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Engines default these differently, hence all are written."""


def exported_tensors(draft: Eagle3Draft, layer: str = "midlayer") -> dict[str, Tensor]:
    """The draft's tensors by exported name.

    A draft over the whole vocabulary has no d2t and t2d: vLLM has no place for them then and refuses the file.
    """
    full = draft.config.draft_vocab_size == draft.config.vocab_size
    tensors = {name: tensor for name, tensor in draft.state_dict().items() if not (full and name in ("d2t", "t2d"))}
    return {exported_name(name, layer): tensor.contiguous().cpu() for name, tensor in tensors.items()}


def exported_name(own: str, layer: str = "midlayer") -> str:
    module, _, kind = own.rpartition(".")
    return f"{layer}.{_LAYER[module]}.{kind}" if module in _LAYER else own


def own_name(exported: str) -> str:
    """The inverse, for either name of the layer; a name that is none of ours comes back as it is."""
    module, _, kind = exported.rpartition(".")
    below = module.removeprefix("midlayer.").removeprefix("layers.0.")
    ours = next((own for own, theirs in _LAYER.items() if theirs == below), None)
    return exported if ours is None or below == module else f"{ours}.{kind}"


def export_config(config: Eagle3Config, facts: TargetFacts) -> dict[str, Any]:
    """config.json of the exported folder."""
    rope = dict(config.rope_parameters)
    scaling = (
        None if rope.get("rope_type", "default") == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": config.aux_layer_ids,
        "num_aux_hidden_states": len(config.aux_layer_ids),
        **{flag: getattr(config, flag) for flag in FLAGS},
        "own_rope": config.own_rope,
        "eos_token_id": facts.eos_token_ids,
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The load contract: exported name -> (dtype, shape), from config.json alone."""
    h, i, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    vocab, draft_vocab = config["vocab_size"], config["draft_vocab_size"]
    aux = len(config["eagle_aux_hidden_state_layer_ids"]) * config["target_hidden_size"]
    layer = {
        "self_attn.q_proj": (q, 2 * h), "self_attn.k_proj": (kv, 2 * h), "self_attn.v_proj": (kv, 2 * h),
        "self_attn.o_proj": (h, q), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
        "input_layernorm": (h,), "hidden_norm": (h,), "post_attention_layernorm": (h,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"fc.weight": (h, aux), "norm.weight": (h,), "lm_head.weight": (draft_vocab, h)}
    if config["norm_before_fc"]:
        shapes["input_norm.weight"] = (aux,)
    if config["fc_norm"]:
        ids = config["eagle_aux_hidden_state_layer_ids"]
        shapes |= {f"fc_norm.{i}.weight": (config["target_hidden_size"],) for i in range(len(ids))}
    contract = {name: ("F32", shape) for name, shape in shapes.items()}
    if draft_vocab == vocab:
        return contract
    return contract | {"d2t": ("I64", (draft_vocab,)), "t2d": ("BOOL", (vocab,))}


def save_export(draft: Eagle3Draft, facts: TargetFacts, folder: Path) -> None:
    """Write the folder, check it against the contract and the target, and only then give it its name."""
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", export_config(draft.config, facts))
        save_file(exported_tensors(draft), temporary / "model.safetensors", metadata={"format": "pt"})
        check_export(temporary, facts)


def check_export(folder: Path, facts: TargetFacts | None = None) -> None:
    """Hold a folder against the load contract. Raises UserError naming the first thing that a server would get
    wrong.
    """
    config = read_json(folder / "config.json", what="export config", made_by="specflow export <family>")
    required = {
        "eagle_aux_hidden_state_layer_ids",
        "draft_vocab_size",
        "vocab_size",
        "target_hidden_size",
        *FLAGS,
    }
    if missing := sorted(required - set(config)):
        raise UserError(
            f"{folder}/config.json lacks {missing}: engines would fall back silently; export the draft again"
        )
    contract = expected_shapes(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        maps = {n: file.get_tensor(n) for n in ("d2t", "t2d") if n in contract and shapes.get(n) == contract[n]}
    if missing := sorted(set(contract) - set(shapes)):
        raise UserError(f"{folder}: missing tensors {missing}: export the draft again")
    if unknown := sorted(set(shapes) - set(contract)):
        raise UserError(f"{folder}: unknown tensors {unknown}: engines refuse or ignore them; export the draft again")
    for name, expected in contract.items():
        if shapes[name] != expected:
            raise UserError(f"{folder}: {name} is {shapes[name]}, expected {expected}: export the draft again")
    if maps and not torch.equal(torch.arange(len(maps["d2t"])) + maps["d2t"], maps["t2d"].nonzero().squeeze(1)):
        raise UserError(f"{folder}: d2t and t2d name different tokens: run the vocab and train stages again")
    if config["eagle_aux_hidden_state_layer_ids"] != sorted(set(config["eagle_aux_hidden_state_layer_ids"])):
        raise UserError(
            f"{folder}: aux layer ids {config['eagle_aux_hidden_state_layer_ids']} must ascend: engines sort them, "
            "fc does not; export the draft again"
        )
    if facts is not None:
        _check_target(folder, config, facts)


def _check_target(folder: Path, config: dict[str, Any], facts: TargetFacts) -> None:
    pairs = {
        "vocab_size": facts.vocab_size,
        "target_hidden_size": facts.hidden_size,
    }
    if not config.get("own_rope"):
        pairs |= {
            "max_position_embeddings": facts.max_position_embeddings,
            "rope_parameters": facts.rope_parameters,
        }
    for key, expected in pairs.items():
        if config[key] != expected:
            raise UserError(
                f"{folder}: {key} is {config[key]}, the target's is {expected}: this draft was made for another target"
            )


def load_export(folder: Path) -> Eagle3Draft:
    """Read an exported folder back as a draft (fp32, CPU). Raises UserError where the contract does not hold."""
    check_export(folder)
    config = read_json(folder / "config.json", what="export config", made_by="specflow export <family>")
    own = {name: config[name] for name in Eagle3Config.model_fields if name in config}
    draft = Eagle3Draft(Eagle3Config(**own, aux_layer_ids=config["eagle_aux_hidden_state_layer_ids"]))
    draft.load_state_dict(
        with_maps({own_name(k): v for k, v in load_file(folder / "model.safetensors").items()}, draft)
    )
    return draft.eval()


def with_maps(state: dict[str, Tensor], draft: Eagle3Draft) -> dict[str, Tensor]:
    """The state with d2t and t2d, which a draft over the whole vocabulary does not carry."""
    config = draft.config
    if config.draft_vocab_size != config.vocab_size:
        return state
    everything = {
        "d2t": torch.zeros(config.vocab_size, dtype=torch.int64),
        "t2d": torch.ones(config.vocab_size, dtype=torch.bool),
    }
    return {**everything, **state}
