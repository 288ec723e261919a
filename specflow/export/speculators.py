"""speculators' form of a draft: it names its target, so `vllm serve <folder>` alone serves both.

Config keys and tensor names: speculators' EAGLE-3 model config, read in vLLM by transformers_utils/configs/speculators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.export.eagle3 import FLAGS, exported_tensors
from specflow.files import atomic_path, write_json
from specflow.targets.model import TargetFacts

_LAYER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "vocab_size",
)


def speculators_config(
    config: Eagle3Config, facts: TargetFacts, verifier: str, num_speculative_tokens: int
) -> dict[str, Any]:
    """config.json; `verifier` is the target's hub name or path."""
    layer = {key: getattr(config, key) for key in _LAYER_KEYS}
    # vLLM reads the number of aux layers from here; without it, it assumes three.
    layer |= {"model_type": "llama", "num_hidden_layers": 1, "num_aux_hidden_states": len(config.aux_layer_ids)}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": num_speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": config.draft_vocab_size,
        **{flag: getattr(config, flag) for flag in FLAGS},
        "embed_requires_grad": False,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": config.aux_layer_ids,
        "transformer_layer_config": {**layer, "tie_word_embeddings": False, "attention_bias": False},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": [facts.architecture]},
        },
    }


def save_speculators(
    draft: Eagle3Draft, facts: TargetFacts, folder: Path, *, verifier: str, num_speculative_tokens: int
) -> None:
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", speculators_config(draft.config, facts, verifier, num_speculative_tokens))
        save_file(exported_tensors(draft, "layers.0"), temporary / "model.safetensors", metadata={"format": "pt"})
