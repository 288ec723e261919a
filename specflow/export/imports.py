"""EAGLE-3 drafts that other tools trained, read as ours: what a file does not say is assumed, and the assumption said.

Layouts: SafeAILab EAGLE and AngelSlim (`midlayer.*` in pytorch_model.bin, no layer ids), SpecForge (`midlayer.*`, ids
below `eagle_config` that count layer outputs from 0), speculators (`layers.0.*`, config nested under
`transformer_layer_config`), ours and vLLM's plain form (ids at the top level, counted from the embeddings = 0).
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.export.eagle3 import FLAGS, own_name, with_maps
from specflow.targets.model import TargetFacts, load_embedding
from specflow.targets.weights import LFS_POINTER

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREFIXES = ("model.", "draft_model.")


def read_draft(folder: Path, facts: TargetFacts, cache: Path) -> tuple[Eagle3Draft, list[str]]:
    """A draft for the target of `facts` from a folder in any known layout (fp32, CPU), and what was assumed.

    Raises UserError where the folder is none of the layouts, belongs to another target, or holds tensors that we would
    have to leave out.
    """
    raw = _read_config(folder)
    tensors = {_strip(name): tensor for name, tensor in _read_tensors(folder).items()}
    _check_numbers(tensors, folder)
    layer, flags, layout = _layout(raw, folder)
    notes = [f"{folder}: {layout}"]
    aux_layer_ids = _aux_layer_ids(raw, facts, notes)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    draft_vocab = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else 0
    _check_embedding(tensors.pop("embed_tokens.weight", None), folder, facts, cache, notes)
    config = _config(layer, flags, aux_layer_ids, draft_vocab, facts, folder, notes)
    draft = Eagle3Draft(config)
    maps = _vocabulary_maps(d2t, t2d, config, folder)
    state = with_maps({own_name(k): v.float() for k, v in tensors.items()} | maps, draft)
    _check_names(state, draft, folder)
    draft.load_state_dict(state)
    return draft.eval(), notes


def weights_file(folder: Path) -> Path:
    """The file of `folder` that a draft's weights are read from. Raises UserError where there is none."""
    for name in _WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} has neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}: name the folder of an EAGLE-3 draft")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        text = path.read_bytes()
        raw = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: name the folder of an EAGLE-3 draft") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and text.startswith(LFS_POINTER):
            raise UserError(f"{path} is a Git LFS pointer: run `git lfs pull` in the draft's repository") from None
        raise UserError(f"{path} is no JSON ({' '.join(str(error).split())[:100]}): fetch the draft again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, expected an object: name the folder of an EAGLE-3 draft")
    return raw


def _check_numbers(tensors: dict[str, Tensor], folder: Path) -> None:
    """Weights are finite floats; d2t and t2d alone hold something else."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{folder}: {name} is a {type(tensor).__name__}, expected a tensor: fetch the draft again")
        if name in ("d2t", "t2d"):
            if tensor.ndim != 1 or tensor.is_floating_point():
                kind = f"{str(tensor.dtype)[6:]} of shape {list(tensor.shape)}"
                raise UserError(f"{folder}: {name} is {kind}, expected one whole number or bool for each token")
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(
                f"{folder}: {name} is {str(tensor.dtype)[6:]}, expected a float dtype: a quantised draft is not read, "
                "dequantise it first"
            )
        elif not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder}: {name} holds NaN or infinity: its training went wrong, take another checkpoint")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = weights_file(folder)
    try:
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer: run `git lfs pull` in the draft's repository")
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise UserError(f"{path} holds a {type(loaded).__name__}, expected tensors by name: fetch the draft again")
        return loaded
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:  # cut off, or more than tensors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {folder} cannot be read ({reason}): fetch the draft again") from None


def _strip(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _layout(raw: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, bool], str]:
    """Config of the decoder layer, the norm flags, and the layout in words."""
    kind = raw.get("speculators_model_type")
    if kind is None:
        flags = {flag: bool(raw.get(flag, False)) for flag in FLAGS}
        return raw, flags, "plain EAGLE-3 form; norm flags that it does not name are off, as vLLM reads it"
    if kind != "eagle3":
        raise UserError(f"{folder} is a speculators draft of type {kind!r}: only eagle3 can be read")
    if "transformer_layer_config" not in raw:
        raise UserError(f"{folder}/config.json has no transformer_layer_config: fetch the draft again")
    flags = {flag: bool(raw.get(flag, flag == "norm_before_residual")) for flag in FLAGS}
    return (
        _section(raw, "transformer_layer_config"),
        flags,
        "speculators form; norm_before_residual is on unless it says otherwise",
    )


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"config.json of the draft: {key} is {found!r}, expected an object: fetch the draft again")
    return found


def _aux_layer_ids(raw: dict[str, Any], facts: TargetFacts, notes: list[str]) -> list[int]:
    """Ascending ids counted from the embeddings = 0."""
    if (ids := raw.get("eagle_aux_hidden_state_layer_ids")) is not None:
        notes.append(f"aux layers {ids}, counted from the embeddings = 0 as vLLM does")
    elif (outputs := _section(raw, "eagle_config").get("eagle_aux_hidden_state_layer_ids")) is not None:
        ids = (
            [i + 1 for i in outputs] if isinstance(outputs, list) and all(type(i) is int for i in outputs) else outputs
        )
        notes.append(f"aux layers {ids}: eagle_config's {outputs} are taken as layer outputs counted from 0")
    else:
        ids = facts.default_aux_layer_ids()
        notes.append(f"aux layers {ids}: the file names none, EAGLE-3's default for {facts.num_hidden_layers} layers")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"aux layers {ids!r} are no list of layer numbers: mend eagle_aux_hidden_state_layer_ids")
    if ids != sorted(set(ids)) or not all(0 <= i <= facts.num_hidden_layers for i in ids):
        raise UserError(f"aux layers {ids} must ascend within the target's 0..{facts.num_hidden_layers}")
    return list(ids)


def _check_embedding(own: Tensor | None, folder: Path, facts: TargetFacts, cache: Path, notes: list[str]) -> None:
    if own is None:
        notes.append("no embedding of its own: the target's is used")
        return
    table = load_embedding(facts, cache)
    if own.shape != table.shape or not torch.allclose(own.float(), table.float(), rtol=0.01, atol=1e-3):
        raise UserError(
            f"{folder} has an embedding {list(own.shape)} that is not the target's {list(table.shape)}: a draft with "
            "an embedding of its own cannot share the target's"
        )
    notes.append("its embedding is a copy of the target's and is left out")


def _config(
    layer: dict[str, Any],
    flags: dict[str, bool],
    aux_layer_ids: list[int],
    draft_vocab: int,
    facts: TargetFacts,
    folder: Path,
    notes: list[str],
) -> Eagle3Config:
    from transformers import LlamaConfig
    from transformers.activations import ACT2FN

    if layer.get("num_hidden_layers", 1) != 1 or draft_vocab == 0:
        raise UserError(f"{folder} is no EAGLE-3 draft of one layer with a head: check what it is")
    if layer.get("vocab_size", facts.vocab_size) != facts.vocab_size:
        raise UserError(
            f"{folder} drafts for a vocabulary of {layer['vocab_size']}, the target has {facts.vocab_size}: "
            "this draft was made for another target"
        )
    given = {key: value for key, value in layer.items() if key not in ("architectures", "model_type")}
    try:
        known = LlamaConfig(**given)
        ACT2FN[known.hidden_act]  # raises KeyError for one that nobody knows
        config = Eagle3Config(
            hidden_size=known.hidden_size,
            target_hidden_size=facts.hidden_size,
            intermediate_size=known.intermediate_size,
            num_attention_heads=known.num_attention_heads,
            num_key_value_heads=known.num_key_value_heads,
            head_dim=known.head_dim,
            rms_norm_eps=known.rms_norm_eps,
            hidden_act=known.hidden_act,
            max_position_embeddings=known.max_position_embeddings,
            rope_parameters=dict(known.rope_parameters),
            vocab_size=facts.vocab_size,
            draft_vocab_size=draft_vocab,
            aux_layer_ids=aux_layer_ids,
            **flags,
        )
    except Exception as error:  # transformers' or pydantic's, by what is wrong with a value
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}/config.json describes no Llama layer ({reason}): fetch the draft again") from None
    own_rope = (config.rope_parameters, config.max_position_embeddings) != (
        facts.rope_parameters,
        facts.max_position_embeddings,
    )
    if own_rope:
        notes.append(
            f"RoPE {config.rope_parameters} over {config.max_position_embeddings} positions is its own, the target's "
            f"is {facts.rope_parameters} over {facts.max_position_embeddings}"
        )
    return config.model_copy(update={"own_rope": own_rope})


def _vocabulary_maps(d2t: Tensor | None, t2d: Tensor | None, config: Eagle3Config, folder: Path) -> dict[str, Tensor]:
    """d2t and t2d of the draft. Raises UserError where there is none to go by, or the two contradict each other."""
    if config.draft_vocab_size == config.vocab_size:
        if d2t is not None and bool(d2t.any()):
            raise UserError(
                f"{folder}: its head covers the whole vocabulary, yet d2t moves tokens: one of them is wrong"
            )
        return {}
    if d2t is None or len(d2t) != config.draft_vocab_size:
        raise UserError(
            f"{folder}: d2t has {None if d2t is None else len(d2t)} entries, its head {config.draft_vocab_size}: "
            "without it nobody can say which tokens it drafts"
        )
    ids = torch.arange(len(d2t)) + d2t.to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(ids.unique()) != len(ids):
        raise UserError(f"{folder}: d2t does not name {len(d2t)} distinct tokens of the target's vocabulary")
    drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
    drafted[ids] = True
    if t2d is not None and len(t2d) != config.vocab_size:
        raise UserError(f"{folder}: t2d has {len(t2d)} entries, the target's vocabulary {config.vocab_size}")
    if t2d is not None and not t2d.bool().equal(drafted):
        differ = int((t2d.bool() != drafted).sum())
        raise UserError(
            f"{folder}: d2t and t2d contradict each other about {differ} tokens (d2t holds offsets, target id - draft "
            "id): mend the one that is wrong"
        )
    return {"d2t": d2t.to(torch.int64), "t2d": drafted}


def _check_names(state: dict[str, Tensor], draft: Eagle3Draft, folder: Path) -> None:
    own = draft.state_dict()
    if missing := sorted(set(own) - set(state)):
        raise UserError(f"{folder}: missing tensors {missing}")
    if unknown := sorted(set(state) - set(own)):
        raise UserError(f"{folder}: tensors {unknown} have no place in the draft, so it would not be the same one")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise UserError(f"{folder}: {name} is {list(state[name].shape)}, expected {list(tensor.shape)}")
