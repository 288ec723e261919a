"""A target's checkpoint held whole against the model that it is loaded as, by headers alone.

transformers itself loads the checkpoint, with stand-ins for its tensors that have shapes and no memory. So what is
missing, of another shape or renamed on the way is what transformers finds, and head and embedding are the tensors that
the loaded model has: nothing is concluded from names.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError, explained
from specflow.targets.weights import StoredTensor, read_tensor, stored_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """What the checkpoint becomes when it is loaded."""

    num_parameters: int
    tie_word_embeddings: bool
    embedding_key: str
    """Name in the checkpoint of the input embedding, [vocab_size, hidden_size]."""
    lm_head_key: str
    """Of the output head; the embedding's where the two are one."""


def check_whole(
    folder: Path, config: PretrainedConfig, *, trust_remote_code: bool = False, quantised: bool = False
) -> LoadedModel:
    """Raise UserError unless the checkpoint has every tensor that the model needs, of its shape and a float dtype.

    Of a quantised target the tables and norms alone are looked at: the engine that unpacks the rest checks it.
    """
    stored = stored_tensors(folder)
    stand_ins = _stand_ins(stored if quantised else {name: t for name, t in stored.items() if t.is_float})
    model, report = _load(folder, config, stand_ins, trust_remote_code)
    missing = {name for name in report["missing_keys"] if _is_checked(model, name, quantised)}
    if missing and (other := [name for name in stored if name not in stand_ins]):
        raise UserError(
            f"{folder}: tensor {other[0]!r} and {len(other) - 1} more are stored as {stored[other[0]].dtype}, "
            "expected a float dtype (float32, bfloat16, float16): name an unquantised checkpoint"
        )
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the tensors that {type(model).__name__} needs by its config.json, "
            f"{min(missing)!r} first: fetch it again, whole, or correct config.json"
        )
    for name, got, expected in sorted(report["mismatched_keys"]):
        if _is_checked(model, name, quantised):
            raise UserError(
                f"{folder}: tensor {name!r} has shape {list(got)}, by config.json it is {list(expected)}: weights and "
                "config are of different models, or the config was edited"
            )
    return _tables(folder, model, stored, stand_ins)


def _stand_ins(stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Tensors without memory. Each has a place of its own in one storage, by which it is known wherever it ends up."""
    import torch

    sizes = [math.prod(tensor.shape) for tensor in stored.values()]
    storage = torch.empty(1 + sum(sizes), dtype=torch.float32, device="meta")
    views, start = {}, 1  # a tensor that was made anew on loading starts at 0
    for (name, tensor), size in zip(stored.items(), sizes, strict=True):
        views[name] = storage[start : start + size].view(tensor.shape)
        start += size
    return views


def _load(
    folder: Path, config: PretrainedConfig, stand_ins: dict[str, torch.Tensor], trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):  # the engine unpacks, here it would want its kernels
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    what = f"transformers cannot build the model that {folder / 'config.json'} describes"
    with explained(what, "correct it, or name another target"), torch.device("meta"):
        model_class: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    # the one thing that fails here and is not reported below: experts that are put together from tensors of their own
    what = f"transformers cannot put the tensors of {folder} together to {model_class.__name__}"
    with explained(what, "one is missing or of another shape; fetch the checkpoint again, whole"):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(stand_ins),
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return loaded


def _is_checked(model: PreTrainedModel, name: str, quantised: bool) -> bool:
    tensor = model.get_parameter_or_buffer(name)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    is_table = any(tensor is getattr(table, "weight", None) for table in tables)
    return tensor.is_floating_point() and (not quantised or tensor.ndim == 1 or is_table)


def _tables(
    folder: Path, model: PreTrainedModel, stored: dict[str, StoredTensor], stand_ins: dict[str, torch.Tensor]
) -> LoadedModel:
    text = model.config.get_text_config()
    shape = (text.vocab_size, text.hidden_size)
    names = {tensor.storage_offset(): name for name, tensor in stand_ins.items()}

    def key_of(what: str, module: Any) -> str:
        weight = getattr(module, "weight", None)
        name = None if weight is None else names.get(weight.storage_offset())
        if name is None or stored[name].shape != shape or not stored[name].is_float:
            got = "no" if name is None else f"{stored[name].dtype} {list(stored[name].shape)}"
            raise UserError(
                f"{what} of {type(model).__name__}: {got} tensor in {folder}, expected one float [vocab_size, "
                f"hidden_size] = {list(shape)}: not supported"
            )
        return name

    embedding = key_of("input embedding", model.get_input_embeddings())
    head = key_of("output head", model.get_output_embeddings())
    num_parameters = sum(weight.numel() for weight in model.parameters())
    tied = bool(model.config.tie_word_embeddings or text.tie_word_embeddings)
    if tied and head != embedding:
        if not read_tensor(folder, head).equal(read_tensor(folder, embedding)):
            raise UserError(
                f"{folder / 'config.json'} says that head and embedding are one (tie_word_embeddings), but {head!r} "
                f"differs from {embedding!r}: transformers would use it, vLLM would not; set tie_word_embeddings to "
                "false there if it is the model's"
            )
        head = embedding  # equal ones are one when loaded, which stand-ins cannot show
        num_parameters -= math.prod(shape)
    return LoadedModel(num_parameters, head == embedding, embedding, head)
