"""Drafts of other trainers: their key layouts, what is assumed, and what is refused. Layouts: export/imports.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.export.eagle3 import exported_tensors, load_export, save_export
from specflow.export.imports import read_draft
from specflow.export.speculators import save_speculators
from specflow.targets.model import load_embedding
from tests.captures import tiny_project
from tests.toys import make_tiny_target

LAYER_KEYS = [
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "max_position_embeddings", "vocab_size", "draft_vocab_size",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    return tiny_project(folder / "project", make_tiny_target(folder / "target"))


def make_draft(facts, draft_vocab_size=100, seed=0, **changes) -> Eagle3Draft:
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=facts.hidden_size,
        target_hidden_size=facts.hidden_size,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=facts.rms_norm_eps,
        max_position_embeddings=facts.max_position_embeddings,
        rope_parameters=facts.rope_parameters,
        vocab_size=facts.vocab_size,
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=[2, 3, 5],
    )
    draft = Eagle3Draft(Eagle3Config(**(shape | changes)))
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    ids = torch.randperm(facts.vocab_size)[:draft_vocab_size].sort().values
    draft.d2t.copy_(ids - torch.arange(draft_vocab_size))
    draft.t2d[ids] = True
    return draft.eval()


def write(folder, draft, layer, config, *, pickled=False, extra=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = exported_tensors(draft, layer) | (extra or {})
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def layer_config(draft):
    rope = {"rope_theta": draft.config.rope_parameters["rope_theta"]}
    return {key: getattr(draft.config, key) for key in LAYER_KEYS} | rope


def same(draft, back):
    assert back.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_eagles_own_layout_is_a_pickled_file_without_layer_ids(project, tmp_path):
    draft = make_draft(project.facts, aux_layer_ids=project.facts.default_aux_layer_ids())
    config = layer_config(draft) | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    folder = write(tmp_path / "d", draft, "midlayer", config, pickled=True)
    back, notes = read_draft(folder, project.facts, project.paths.cache)
    same(draft, back)
    assert any("default for 6 layers" in note for note in notes)


def test_specforges_layer_ids_count_layer_outputs_and_its_embedding_is_the_targets(project, tmp_path):
    draft = make_draft(project.facts, aux_layer_ids=[1, 3, 6])
    config = layer_config(draft) | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}}
    table = load_embedding(project.facts, project.paths.cache)
    folder = write(tmp_path / "d", draft, "midlayer", config, extra={"embed_tokens.weight": table.clone()})
    back, notes = read_draft(folder, project.facts, project.paths.cache)
    same(draft, back)
    assert any("[1, 3, 6]" in note and "[0, 2, 5]" in note for note in notes)
    folder = write(tmp_path / "e", draft, "midlayer", config, extra={"embed_tokens.weight": table + 1})
    with pytest.raises(UserError, match=r"an embedding .* that is not the target's"):
        read_draft(folder, project.facts, project.paths.cache)


@pytest.mark.parametrize(
    "flags",
    [
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
        {"norm_before_residual": True, "fc_norm": True},
        {"aux_layer_ids": [1, 2, 4, 6]},
    ],
)
def test_speculators_form_round_trips_with_its_norms(project, tmp_path, flags):
    draft = make_draft(project.facts, **flags)
    save_speculators(draft, project.facts, tmp_path / "d", verifier="org/name", num_speculative_tokens=4)
    same(draft, read_draft(tmp_path / "d", project.facts, project.paths.cache)[0])
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    del config["norm_before_residual"]  # its own default is on
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    assert read_draft(tmp_path / "d", project.facts, project.paths.cache)[0].config.norm_before_residual


def test_an_imported_draft_exports_and_loads_again(project, tmp_path):
    """All layers of the chain keep an own RoPE, which a draft trained by us could not have."""
    draft = make_draft(project.facts, max_position_embeddings=64, norm_before_residual=True)
    folder = write(tmp_path / "d", draft, "midlayer", layer_config(draft) | {"norm_before_residual": True})
    back, notes = read_draft(folder, project.facts, project.paths.cache)
    assert back.config.own_rope and any("64 positions is its own" in note for note in notes)
    save_export(back, project.facts, tmp_path / "eagle3")
    same(back, load_export(tmp_path / "eagle3"))


def test_a_draft_over_the_whole_vocabulary_carries_no_map(project, tmp_path):
    draft = make_draft(project.facts, draft_vocab_size=project.facts.vocab_size)
    save_export(draft, project.facts, tmp_path / "eagle3")
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "eagle3" / "model.safetensors"))
    same(draft, load_export(tmp_path / "eagle3"))
    same(draft, read_draft(tmp_path / "eagle3", project.facts, project.paths.cache)[0])


def test_norm_variants_are_what_they_say(project):
    """Closed forms on one row: the recycled state and the head's input of each variant, from the plain one's parts."""
    aux = torch.randn(1, 3 * project.facts.hidden_size)
    plain = make_draft(project.facts)
    for flag in ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm"):
        draft = make_draft(project.facts, **{flag: True})
        draft.load_state_dict(plain.state_dict(), strict=False)
        h, attended = torch.randn(1, 32), torch.randn(1, 64)
        after = (plain.hidden_norm(h) if flag == "norm_before_residual" else h) + plain.o_proj(attended)
        x = plain.post_attention_layernorm(after)
        out = after + plain.down_proj(torch.nn.functional.silu(plain.gate_proj(x)) * plain.up_proj(x))
        recycled = plain.norm(out) if flag == "norm_output" else out
        torch.testing.assert_close(draft._finish(h, attended), recycled)
        torch.testing.assert_close(draft.logits(recycled), plain.lm_head(plain.norm(out)))
        if flag == "norm_before_fc":
            scale = aux.pow(2).mean().add(draft.config.rms_norm_eps).rsqrt()
            torch.testing.assert_close(draft.project(aux), plain.fc(aux * scale * draft.input_norm.weight))
        if flag == "fc_norm":
            streams = aux.view(3, -1)
            scale = streams.pow(2).mean(1, keepdim=True).add(draft.config.rms_norm_eps).rsqrt()
            weights = torch.stack([norm.weight for norm in draft.fc_norm])
            torch.testing.assert_close(draft.project(aux), plain.fc((streams * scale * weights).view(1, -1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: tensors.pop("d2t"), "d2t has None entries, its head 100"),
        (lambda config, tensors: tensors.pop("fc.weight"), r"missing tensors \['fc.weight'\]"),
        (lambda config, tensors: config.update(vocab_size=999), "vocabulary of 999, the target has 300"),
        (lambda config, tensors: config.update(num_hidden_layers=2), "no EAGLE-3 draft of one layer"),
        (lambda config, tensors: config.update(eagle_aux_hidden_state_layer_ids=[5, 3, 2]), "must ascend"),
        (lambda config, tensors: config.update(eagle_aux_hidden_state_layer_ids=[1, 2]), r"fc.weight is \[32, 96\]"),
        (lambda config, tensors: config.update(speculators_model_type="dflash"), "only eagle3 can be read"),
        (lambda config, tensors: config.update(speculators_model_type="eagle3"), "has no transformer_layer_config"),
        (
            lambda config, tensors: tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(16)}),
            "have no place in the draft",
        ),
        (lambda config, tensors: (tensors["d2t"].fill_(0), tensors.pop("t2d")), None),
    ],
)
def test_what_cannot_be_read_faithfully_is_one_line(project, tmp_path, change, message):
    draft = make_draft(project.facts, aux_layer_ids=project.facts.default_aux_layer_ids())
    config, tensors = layer_config(draft), exported_tensors(draft)
    change(config, tensors)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "d" / "model.safetensors")
    if message is None:  # offsets of zero name the first 100 tokens: allowed, and then that is what it drafts
        assert read_draft(tmp_path / "d", project.facts, project.paths.cache)[0].t2d.nonzero().max() == 99
        return
    with pytest.raises(UserError, match=message):
        read_draft(tmp_path / "d", project.facts, project.paths.cache)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_one_line(project, tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    for content in (b"", b"not weights at all"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"the weights in .* cannot be read .* fetch the draft again"):
            read_draft(tmp_path, project.facts, project.paths.cache)


def test_a_folder_that_is_no_draft_is_one_line(project, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        read_draft(tmp_path, project.facts, project.paths.cache)
