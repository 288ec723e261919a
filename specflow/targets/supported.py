"""A target's config: whether it is of a kind that later stages run rightly, and what a draft copies from it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError, explained
from specflow.targets.model import attention_of
from specflow.targets.weights import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger("specflow")
TESTED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "phi3"}
TESTED |= {"smollm3", "exaone4"}
"""Model types whose every forward tests/unit/targets/test_architectures.py holds against plain transformers."""
QUANTISED = {"fp8", "compressed-tensors"}
"""Quantisations that vLLM runs and that are supported there; in this process none is."""


def read_config(folder: Path, *, trust_remote_code: bool, num_tensors: int) -> PretrainedConfig:
    """The checkpoint's config. Raises UserError, with the cause, for one that transformers cannot read, would fill up
    with another model's numbers, or that has more layers than the checkpoint's `num_tensors` tensors can be of.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    path = folder / "config.json"
    raw = read_json_object(path)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and not ("auto_map" in raw and trust_remote_code):
        own_code = (
            "; it brings code of its own: set target.trust_remote_code if you trust it" if "auto_map" in raw else ""
        )
        raise UserError(
            f"{path} has model_type {kind!r}, which transformers {__version__} does not know: install a transformers "
            f"that knows it, or name another target{own_code}"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), with which some engines would run the model and some "
            "without: name a folder with the merged weights"
        )
    if (deepest := _deepest(raw)) > num_tensors:
        raise UserError(f"{path} says {deepest} layers, but the checkpoint has {num_tensors} tensors: correct it")
    with explained(f"transformers cannot read {path}", "correct it, or fetch it again"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if config.get_text_config() is config:  # nested ones leave out what is their class's own
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if raw.get(name) is None and raw.get(config.attribute_map.get(name, name)) is None:
                raise UserError(
                    f"{path} has no {name}, and transformers would take {getattr(config, name, None)} for it: add the "
                    "model's"
                )
    return config


def _deepest(raw: Any) -> int:
    """The largest number of layers that any part of a config names: each would be built one by one."""
    if not isinstance(raw, dict):
        return 0
    own = [n for key, n in raw.items() if re.fullmatch(r"(num|n)_(\w+_)?layers?", key) and type(n) is int]
    return max([*own, *map(_deepest, raw.values())], default=0)


def quantisation(config: PretrainedConfig) -> str | None:
    """Name of the quantisation that a config declares. Raises UserError for one that is not supported."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            method = str(settings.get("quant_method") or "of no name")
            if method not in QUANTISED:
                raise UserError(
                    f"target is quantised ({method}): supported are fp8 and compressed-tensors, through vLLM; "
                    "name the unquantised checkpoint"
                )
            return method
    return None


def check_supported(config: PretrainedConfig, *, remote_code: bool = False) -> None:
    """Raise UserError for a target that later stages would run wrongly or not at all.

    Judged by what the config says, not by names: the draft's teacher is the head alone, attention is full or sliding
    and runs in torch's fused kernel, angles do not change with the length. `sample` then holds its own forward against
    transformers' on the real weights before it answers anything.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    what = f"target of model type {text.model_type}"
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(text, name, None) is not None:
            raise UserError(f"{what} caps its logits ({name}): not supported, use a target without")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1.0):
            raise UserError(f"{what} scales its logits ({name} {getattr(text, name)}): not supported, use one without")
    attention_of(text)
    kind = _rope(text).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(f"{what} uses RoPE type {kind!r}, whose angles change with the length: not supported")
    if remote_code:
        return
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"transformers has no causal language model of type {config.model_type}: use a decoder")
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        raise UserError(f"{what} cannot run in torch's fused attention (sdpa): not supported, use another target")
    if text.model_type not in TESTED:
        logger.warning("%s is not among those that the tests compare with transformers; sample will check it", what)


def shape_facts(text: PretrainedConfig) -> dict[str, Any]:
    """What a draft copies from the text decoder's config."""
    return {
        "model_type": text.model_type,
        "num_hidden_layers": _setting(text, "num_hidden_layers"),
        "hidden_size": _setting(text, "hidden_size"),
        "intermediate_size": _setting(text, "intermediate_size"),
        "num_attention_heads": _setting(text, "num_attention_heads"),
        "num_key_value_heads": _setting(text, "num_key_value_heads", "num_attention_heads"),
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "vocab_size": _setting(text, "vocab_size"),
        "rms_norm_eps": _setting(text, "rms_norm_eps"),
        "hidden_act": _setting(text, "hidden_act", "hidden_activation"),
        "max_position_embeddings": _setting(text, "max_position_embeddings"),
        "rope_parameters": _rope(text),
    }


def _rope(text: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the layers that see everything: the draft, one layer over the whole context, takes these."""
    rope = dict(_setting(text, "rope_parameters"))
    return dict(rope.get("full_attention", rope))


def _setting(config: PretrainedConfig, *names: str) -> Any:
    """First of `names` that a config sets."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise UserError(
        f"config of model type {config.model_type} has no {names[0]}: specflow drafts for decoders of the Llama kind"
    )
