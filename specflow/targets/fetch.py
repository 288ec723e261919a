"""Stage `fetch`: the target and every data file on this disk, and target.json with the target's facts.

A GGUF target is dequantised once into a safetensors checkpoint that any engine loads. After this stage no
later one needs the network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.config import Family, Params, Target
from specflow.errors import UserError
from specflow.files import atomic_path, sha256_json, write_json
from specflow.paths import Paths
from specflow.sources import digest_of, resolve
from specflow.targets.model import TargetFacts, attention_of, load_tokenizer
from specflow.targets.template import end_of_turn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger("specflow")
TESTED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "phi3"}
TESTED |= {"smollm3", "exaone4"}
"""Model types whose every forward tests/unit/targets/test_architectures.py holds against plain transformers."""
_GGUF_CONVERSION = 1
"""Raise when the conversion changes: part of the key of converted checkpoints."""
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"}
_TOKENIZER_FILES |= {"vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"}
_CONFIG_FILES = {"config.json", "generation_config.json", "model.safetensors.index.json"}


def run(
    name: str, family: Family, params: Params, paths: Paths, log: Callable[[dict[str, float], int], None]
) -> dict[str, float]:
    """Fetch target, data sources and prompt sets into the cache; write target.json."""
    folder = fetch_target(family.target, paths.cache)
    facts = read_checkpoint(family.target, folder, paths.cache)
    others = [resolve(source, paths.cache) for source in (*family.data.sources, *params.prompt_sets.values())]
    write_json(paths.target, facts.model_dump())
    return {
        "target_parameters": facts.num_parameters,
        "target_bytes": sum((folder / file).stat().st_size for file in facts.files),
        "source_bytes": sum(_size(path) for path in others),
    }


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def fetch_target(target: Target, cache: Path) -> Path:
    """Folder of the target as a safetensors checkpoint."""
    path = resolve(target, cache)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{target.parts[0]} has no config.json: name the folder of a transformers checkpoint")
        return path
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(
                f"{target.parts[0]} is neither a checkpoint folder nor a GGUF file: name one of these as target"
            )
    key = sha256_json({"gguf": digest_of(path, cache), "conversion": _GGUF_CONVERSION})[:16]
    folder = cache / "targets" / key
    if not folder.exists():
        with atomic_path(folder) as temporary:
            _dequantise(path, temporary)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"transformers cannot read {gguf.name} ({reason}): use a GGUF of an architecture it supports"
        ) from None
    # The weights are plain float32 now; what says otherwise would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_checkpoint(target: Target, folder: Path, cache: Path) -> TargetFacts:
    """Facts of the checkpoint in `folder`: shape from the config, tensors from the safetensors headers."""
    from transformers import AutoConfig

    if target.chat_template is not None and not Path(target.chat_template).is_file():
        raise UserError(
            f"target.chat_template {target.chat_template} does not exist: name a Jinja file of this project"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=target.trust_remote_code)
    text = config.get_text_config()
    check_supported(config, remote_code=target.trust_remote_code)
    files = _digests(folder, cache)
    facts = TargetFacts(
        source=" + ".join(target.parts),
        revision=_revision(target, folder, cache),
        digest=sha256_json({file: files[file] for file in files if file not in _TOKENIZER_FILES}),
        folder=str(folder.relative_to(cache) if folder.is_relative_to(cache) else folder),
        files=files,
        tokenizer_digest=sha256_json({file: files[file] for file in files if file in _TOKENIZER_FILES}),
        template_digest="",
        architecture=(config.architectures or [type(text).__name__])[0],
        **_tensor_facts(target, text, folder),
        **_shape_facts(text),
        eos_token_ids=[],
        dtype=target.dtype,
        chat_template=target.chat_template,
        template_options=target.template_options,
        trust_remote_code=target.trust_remote_code,
    )
    tokenizer = load_tokenizer(facts, cache)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer of {facts.source} has no tokenizer.json (fast form), which loss masks need: add one"
        )
    return facts.model_copy(
        update={
            "template_digest": sha256_json(tokenizer.chat_template),
            "eos_token_ids": _stop_ids(folder, text, tokenizer),
        }
    )


def _tensor_facts(target: Target, text: PretrainedConfig, folder: Path) -> dict[str, Any]:
    shapes = _tensor_shapes(folder)
    embedding_key = _find_embedding(shapes, text, folder)
    tied = bool(text.tie_word_embeddings)
    return {
        "num_parameters": sum(math.prod(shape) for shape in shapes.values()),
        "tie_word_embeddings": tied,
        "embedding_key": embedding_key,
        "lm_head_key": _find_head(target, shapes, embedding_key, tied, folder),
    }


def _shape_facts(text: PretrainedConfig) -> dict[str, Any]:
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


def _rope(text: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the layers that see everything: the draft, one layer over the whole context, takes these."""
    rope = dict(_setting(text, "rope_parameters"))
    return dict(rope.get("full_attention", rope))


def _revision(target: Target, folder: Path, cache: Path) -> str:
    """Commit of a hub snapshot, digest of a file, or `local` for a folder that its file digests identify."""
    if target.parts[0].startswith("hf:"):
        return folder.name
    path = resolve(target, cache)
    return "local" if path.is_dir() else digest_of(path, cache)


def _setting(config: PretrainedConfig, *names: str) -> Any:
    """First of `names` that a config sets."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise UserError(
        f"config of model type {config.model_type} has no {names[0]}: specflow drafts for decoders of the Llama kind"
    )


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors, read from the safetensors headers."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    if not shapes:
        raise UserError(
            f"{folder} has no safetensors weights: convert the checkpoint (save_pretrained of transformers does)"
        )
    return shapes


def _find_embedding(shapes: dict[str, list[int]], config: PretrainedConfig, folder: Path) -> str:
    table = [config.vocab_size, config.hidden_size]
    endings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    found = [key for key, shape in shapes.items() if key.endswith(endings) and shape == table]
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found)} embedding tables of shape {table} ({found}), expected one: not supported"
        )
    return found[0]


def _find_head(target: Target, shapes: dict[str, list[int]], embedding_key: str, tied: bool, folder: Path) -> str:
    """Name of the output head's tensor, [vocab_size, hidden_size]; the embedding's where the two are tied."""
    table = shapes[embedding_key]
    candidates = sorted(key for key, shape in shapes.items() if shape == table)
    if (key := target.lm_head_key) is not None:
        if shapes.get(key) != table:
            raise UserError(
                f"target.lm_head_key {key!r} is no tensor of shape {table} in {folder}: name one of {candidates}"
            )
        return key
    if tied:
        return embedding_key
    found = [key for key in candidates if key.endswith(("lm_head.weight", "embed_out.weight"))]
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found)} output heads of shape {table}: set target.lm_head_key to one of {candidates}"
        )
    return found[0]


def _digests(folder: Path, cache: Path) -> dict[str, str]:
    """sha256 by file name of the weights, configs and tokenizer files."""
    known = _TOKENIZER_FILES | _CONFIG_FILES
    files = [file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name in known]
    return {file.name: digest_of(file, cache) for file in files}


def _stop_ids(folder: Path, config: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that end an answer: of the generation config, else the config; tokenizer; chat template."""
    from transformers import GenerationConfig

    stop = config.eos_token_id
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
        stop = generation.eos_token_id if generation.eos_token_id is not None else stop
    ids = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(ids - {None})
