"""Fetch: facts of single-file, sharded, tied and nested checkpoints, a real little GGUF, and the errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from specflow import config
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.serving import family as serving
from specflow.targets import fetch, template
from specflow.targets.model import load_embedding, load_lm_head, load_model, load_tokenizer, read_facts
from tests.toys import CHATML, make_conversations_file, make_prompt_set_file, make_tiny_target, make_tiny_tokenizer


def facts_of(folder: Path, tmp_path: Path, **target: Any) -> Any:
    return fetch.read_checkpoint(config.Target(source=f"file:{folder}", **target), folder.resolve(), tmp_path / "cache")


def test_stage_writes_facts_and_counts_bytes(tmp_path: Path) -> None:
    folder = make_tiny_target(tmp_path / "tiny")
    data = make_conversations_file(tmp_path / "data.json", 5)
    questions = make_prompt_set_file(tmp_path / "q.jsonl", 3)
    params = config.parse_params(
        {
            "prompt_sets": {"q": {"source": f"file:{questions}"}},
            "families": {
                "tiny": {
                    "target": {"source": f"file:{folder}"},
                    "vocab": {"draft_vocab_size": 128},
                    "data": {
                        "sources": [{"source": f"file:{data}"}],
                        "train_conversations": 1,
                        "eval_conversations": 1,
                    },
                }
            },
        }
    )
    paths = Paths(tmp_path, "tiny", tmp_path / "cache")
    metrics = fetch.run("tiny", params.family("tiny"), params, paths, lambda values, step: None)
    facts = read_facts(paths.target)
    model = load_model(facts, paths.cache)
    assert metrics["target_parameters"] == facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert metrics["source_bytes"] == data.stat().st_size + questions.stat().st_size
    assert metrics["target_bytes"] == sum((folder / file).stat().st_size for file in facts.files)
    assert (facts.head_dim, facts.num_key_value_heads, facts.num_hidden_layers) == (16, 2, 6)
    assert facts.rope_parameters["rope_theta"] == 10000.0
    assert facts.eos_token_ids == [load_tokenizer(facts, paths.cache).convert_tokens_to_ids("<|im_end|>")]
    assert facts.folder == str(folder)  # a file: source stays where it is
    torch.testing.assert_close(load_lm_head(facts, paths.cache), model.get_output_embeddings().weight)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_equals_single_file(tmp_path: Path, tied: bool) -> None:
    single = make_tiny_target(tmp_path / "single", tie_word_embeddings=tied)
    sharded = make_tiny_target(tmp_path / "sharded", tie_word_embeddings=tied, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, many = facts_of(single, tmp_path), facts_of(sharded, tmp_path)
    differing = {"source", "digest", "folder", "files"}
    assert one.model_dump(exclude=differing) == many.model_dump(exclude=differing)
    assert one.embedding_key == "model.embed_tokens.weight"
    assert one.lm_head_key == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    cache = tmp_path / "cache"
    assert torch.equal(load_lm_head(one, cache), load_lm_head(many, cache))
    assert torch.equal(load_embedding(one, cache), load_embedding(many, cache))


def test_text_config_of_a_nested_architecture(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    tokenizer = make_tiny_tokenizer()
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=[tokenizer.pad_token_id, tokenizer.eos_token_id],
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = tmp_path / "nested"
    nested = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=True)
    Gemma3ForConditionalGeneration(nested).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = facts_of(folder, tmp_path)
    assert (facts.hidden_size, facts.head_dim, facts.hidden_act) == (32, 8, "gelu_pytorch_tanh")
    assert facts.embedding_key.endswith("embed_tokens.weight")
    assert "language_model" in facts.embedding_key
    assert facts.lm_head_key == facts.embedding_key
    assert facts.eos_token_ids == sorted([tokenizer.pad_token_id, tokenizer.eos_token_id])


def test_identity_changes_with_weights_and_template_only_where_it_should(tmp_path: Path) -> None:
    folder = make_tiny_target(tmp_path / "one")
    other_weights = facts_of(make_tiny_target(tmp_path / "two", seed=1), tmp_path)
    facts = facts_of(folder, tmp_path)
    assert other_weights.digest != facts.digest
    assert (other_weights.tokenizer_digest, other_weights.template_digest) == (
        facts.tokenizer_digest,
        facts.template_digest,
    )
    jinja = tmp_path / "own.jinja"
    jinja.write_text(CHATML.replace("\n", " "))
    templated = facts_of(folder, tmp_path, chat_template=str(jinja))
    assert templated.template_digest != facts.template_digest
    assert templated.digest == facts.digest


@pytest.mark.parametrize("loads", [load_model, load_tokenizer, load_lm_head])
def test_other_weights_at_the_same_place_are_refused(tmp_path: Path, loads: Any) -> None:
    """The trained draft's identity is the digest that fetch recorded: nothing runs on other weights under it."""
    folder = make_tiny_target(tmp_path / "tiny")
    facts = facts_of(folder, tmp_path)
    loads(facts, tmp_path / "cache")
    make_tiny_target(tmp_path / "other", seed=1)
    weights = folder / "model.safetensors"
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"tiny/model.safetensors changed since it was fetched: run `dvc repro`"):
        loads(facts, tmp_path / "cache")
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors is gone since it was fetched"):
        loads(facts, tmp_path / "cache")


def test_a_template_that_prints_the_date_is_pinned_for_stages_and_servers(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %B %Y') }}{% if loud %}!{% endif %} " + CHATML
    folder = make_tiny_target(tmp_path / "tiny", chat_template=dated)
    facts = facts_of(folder, tmp_path, template_options={"loud": True})
    assert facts.template_date == "2024-07-26"
    messages = [{"role": "user", "content": "q"}]
    tokenizer = load_tokenizer(facts, tmp_path / "cache")
    assert template.render(tokenizer, messages, True).startswith("26 July 2024! <|im_start|>user")
    paths = Paths(tmp_path, "tiny", tmp_path / "cache")
    option, file = serving._target_args(facts, paths)
    assert option == "--chat-template"
    tokenizer.chat_template = Path(file).read_text()  # what a server renders: the same day, options as asked for
    assert template.render(tokenizer, messages, True).startswith("26 July 2024 <|im_start|>user")
    assert facts_of(make_tiny_target(tmp_path / "plain"), tmp_path).template_date is None


def test_bad_targets_are_one_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    without = make_tiny_target(tmp_path / "without", chat_template=None)
    with pytest.raises(UserError, match=r"no chat template: name a Jinja file in this family's target.chat_template"):
        facts_of(without, tmp_path)
    with pytest.raises(UserError, match=r"chat_template nowhere.jinja does not exist"):
        facts_of(without, tmp_path, chat_template="nowhere.jinja")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        fetch.fetch_target(config.Target(source=f"file:{tmp_path / 'empty'}"), cache)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="neither a checkpoint folder nor a GGUF file"):
        fetch.fetch_target(config.Target(source=f"file:{tmp_path / 'text'}"), cache)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"cannot read bad\.gguf"):
        fetch.fetch_target(config.Target(source=f"file:{tmp_path / 'bad.gguf'}"), cache)
    assert not list((cache / "targets").iterdir())  # no half-made folder
    next(without.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="has no safetensors weights"):
        facts_of(without, tmp_path)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A Llama GGUF as llama.cpp writes it: Q8_0 matrices, q and k rows permuted for its RoPE, tokenizer inside."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("a name that is no model folder")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(key.split(".")[-2])
        if heads:
            split = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
            array = np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(key, (".weight",)), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_tiny_target(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(original)
    tokenizer = make_tiny_tokenizer()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    cache = tmp_path / "cache"
    target = config.Target(source=f"file:{path}")
    folder = fetch.fetch_target(target, cache)
    assert folder.parent == cache / "targets"
    facts = fetch.read_checkpoint(target, folder, cache)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = load_model(facts, cache)
    for key, tensor in loaded.state_dict().items():
        # Q8_0 steps are 1/127 of the largest of 32 values
        torch.testing.assert_close(tensor, model.state_dict()[key], atol=5 / 254, rtol=0)
    assert loaded.dtype == torch.float32
    assert facts.eos_token_ids == [tokenizer.eos_token_id]
    assert load_tokenizer(facts, cache)("the old cat").input_ids == tokenizer("the old cat").input_ids
    monkeypatch.setattr(fetch, "_dequantise", lambda *args: pytest.fail("converted twice"))
    assert fetch.fetch_target(target, cache) == folder
