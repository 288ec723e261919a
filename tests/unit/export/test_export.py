"""The exported folder: round trip, and every way of breaking the load contract is an error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from specflow.errors import UserError
from specflow.export.eagle3 import check_export, load_export, save_export
from specflow.targets.model import TargetFacts
from tests.unit.drafters.test_eagle3 import CONFIG, make_draft

FACTS = TargetFacts(
    source="file:x", revision="r", digest="d", folder="f", files={}, tokenizer_digest="t", template_digest="t",
    architecture="LlamaForCausalLM", model_type="llama", num_parameters=1, hidden_size=CONFIG.target_hidden_size,
    intermediate_size=40, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
    vocab_size=CONFIG.vocab_size, rms_norm_eps=1e-5, hidden_act="silu", max_position_embeddings=128,
    rope_parameters=CONFIG.rope_parameters, tie_word_embeddings=True, lm_head_key="e", embedding_key="e",
    eos_token_ids=[2], dtype="float32",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_export(make_draft(dtype=torch.float32), FACTS, tmp_path / "eagle3")
    return tmp_path / "eagle3"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip_is_equal_tensor_by_tensor_and_in_its_logits(folder):
    draft, back = make_draft(dtype=torch.float32), load_export(folder)
    assert back.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    aux = torch.randn(5, 3 * CONFIG.target_hidden_size)
    assert torch.equal(draft.logits(draft.project(aux)), back.logits(back.project(aux)))


def test_tensor_names_and_shapes_are_those_that_engines_read(folder):
    """The table of vLLM's llama_eagle3 loader and SGLang's, with H=24, A*Ht=60, q=24, kv=8, I=40, D=30, V=50."""
    shapes = {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    assert shapes == {
        "fc.weight": (24, 60),
        "midlayer.self_attn.q_proj.weight": (24, 48),
        "midlayer.self_attn.k_proj.weight": (8, 48),
        "midlayer.self_attn.v_proj.weight": (8, 48),
        "midlayer.self_attn.o_proj.weight": (24, 24),
        "midlayer.mlp.gate_proj.weight": (40, 24),
        "midlayer.mlp.up_proj.weight": (40, 24),
        "midlayer.mlp.down_proj.weight": (24, 40),
        "midlayer.input_layernorm.weight": (24,),
        "midlayer.hidden_norm.weight": (24,),
        "midlayer.post_attention_layernorm.weight": (24,),
        "norm.weight": (24,),
        "lm_head.weight": (30, 24),
        "d2t": (30,),
        "t2d": (50,),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    assert all(config[flag] is False for flag in flags)
    assert (config["rope_theta"], config["rope_scaling"]) == (100.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("d2t"), r"missing tensors \['d2t'\]"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(2)}), "unknown tensors"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].t().contiguous()}), "fc.weight is"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}), "lm_head.weight is"),
        (lambda t: t.update({"d2t": t["d2t"] + 1}), "d2t and t2d name different tokens"),
    ],
)
def test_broken_tensors_are_one_line(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load_export(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 50, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters is"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 64, the target's is 128"),
        ({"eagle_aux_hidden_state_layer_ids": [4, 2, 1]}, "must ascend"),
        ({"norm_output": None}, None),
    ],
)
def test_config_that_disagrees_with_the_target_is_one_line(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    if message is None:
        del config["norm_output"]
        message = r"lacks \['norm_output'\]"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        check_export(folder, FACTS)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    draft = make_draft(dtype=torch.float32)
    draft.t2d[:] = False
    with pytest.raises(UserError, match="different tokens"):
        save_export(draft, FACTS, tmp_path / "eagle3")
    assert list(tmp_path.iterdir()) == []
