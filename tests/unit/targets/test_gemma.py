"""Gemma 3 from checkpoint to draft: scaled embeddings, (1 + w) norms, GELU and two RoPE bases on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from specflow.config import Target
from specflow.data import vocab
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import generate
from specflow.decoding.lookup import LookupDrafter
from specflow.errors import UserError
from specflow.export.eagle3 import export_config
from specflow.extract import stage as extract
from specflow.hidden_states import HiddenStateStore
from specflow.targets import fetch
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import load_embedding, load_lm_head, load_model, load_tokenizer
from specflow.training.initial import copy_from_target, initial_draft
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import CHATML, make_tiny_gemma, make_tiny_target
from tests.unit.extract.test_stage import make_samples


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Samples, draft vocabulary and captured states of a tiny Gemma 3."""
    root = tmp_path_factory.mktemp("gemma")
    (make_tiny_gemma(root / "target") / "chat_template.jinja").write_text(CHATML)
    made = tiny_project(root, root / "target")
    write_split(made.paths.samples, make_samples(12), make_samples(4, prefix="e"))
    made.run(vocab)
    made.run(extract)
    return made


def test_facts_are_what_a_draft_over_the_whole_context_needs(project: TinyProject) -> None:
    facts = project.facts
    assert facts.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}, "the base of the full layers"
    assert (facts.model_type, facts.head_dim, facts.num_key_value_heads) == ("gemma3_text", 16, 1)
    assert facts.tie_word_embeddings and facts.lm_head_key == facts.embedding_key
    draft = initial_draft(facts, project.family, project.paths.cache, project.paths.vocab, [2, 3, 4])
    exported = export_config(draft.config, facts)
    assert (exported["hidden_act"], exported["rope_theta"], exported["rope_scaling"]) == ("silu", 1e6, None)


def test_the_teacher_is_the_head_over_stored_states(project: TinyProject) -> None:
    """Row by row: stored final state times the stored (tied, unscaled) table = the model's own logits."""
    facts, cache = project.facts, project.paths.cache
    model = load_model(facts, cache)
    store = HiddenStateStore.open(project.paths.manifest)
    head = load_lm_head(facts, cache)
    for row in store.rows("eval"):
        token_ids, _, final = store.read(row)
        logits = model(input_ids=token_ids.long()[None]).logits[0]
        torch.testing.assert_close(F.linear(final, head), logits, rtol=1e-3, atol=1e-3)


def test_the_draft_reads_raw_embeddings_and_its_norm_takes_the_scale_out(project: TinyProject) -> None:
    """Servers hand the draft the table without Gemma's factor of sqrt(hidden); the draft's RMSNorm makes both alike."""
    facts, cache = project.facts, project.paths.cache
    model, raw = load_model(facts, cache), load_embedding(project.facts, project.paths.cache)
    ids = torch.arange(20)
    scaled = model.get_input_embeddings()(ids)
    torch.testing.assert_close(scaled, raw[ids] * facts.hidden_size**0.5)
    assert torch.equal(model.get_input_embeddings().weight, raw), "the table that the benchmark hands the draft"
    draft = initial_draft(facts, project.family, cache, project.paths.vocab, [2, 3, 4])
    torch.testing.assert_close(draft.input_layernorm(scaled), draft.input_layernorm(raw[ids]), rtol=1e-3, atol=1e-3)


def test_parts_of_the_target_keep_their_meaning_in_a_llama_layer(project: TinyProject) -> None:
    facts, cache = project.facts, project.paths.cache
    model = load_model(facts, cache)
    draft = initial_draft(facts, project.family, cache, project.paths.vocab, [2, 3, 4])
    copy_from_target(draft, facts, cache, ["mlp", "o_proj", "norm", "lm_head"])
    x = torch.randn(200, facts.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draft.norm(x), model.model.norm(x))
    torch.testing.assert_close(draft.logits(x), model.lm_head(model.model.norm(x))[:, draft.t2d])
    expected = model.model.layers[-1].mlp(x)
    got = draft.down_proj(F.silu(draft.gate_proj(x)) * draft.up_proj(x))
    assert (got - expected).norm() / expected.norm() < 0.02  # silu(1.702 x) / 1.702 for gelu(x)
    as_they_are = draft.down_proj(F.silu(draft.gate_proj(x) / 1.702) * draft.up_proj(x) * 1.702)
    assert (as_they_are - expected).norm() / expected.norm() > 0.1


def test_speculation_is_lossless_beyond_the_sliding_window(project: TinyProject) -> None:
    """Plain decoding = transformers' generate(), every drafter's output = plain decoding, over windows of 16."""
    facts, cache = project.facts, project.paths.cache
    prompt = [5, 80, 13, 200, 41]
    settings = GenerationConfig(do_sample=False, max_new_tokens=60, pad_token_id=0)
    expected = load_model(facts, cache).generate(torch.tensor([prompt]), generation_config=settings)[0, 5:].tolist()
    assert len(expected) > 40 and len(set(expected)) > 8, "a loop would prove little"
    model = optimise_for_inference(load_model(facts, cache))
    draft = initial_draft(facts, project.family, cache, project.paths.vocab, [2, 3, 4])
    target = CachedTarget(model, num_rows=1, max_length=100, aux_layer_ids=[2, 3, 4])
    chain = ChainDrafter(Eagle3Session(draft, model.get_input_embeddings().weight, 100))
    for drafter, k in ((None, 0), (chain, 1), (chain, 3), (LookupDrafter(), 4)):
        got = generate(
            target,
            prompt,
            max_new_tokens=60,
            eos_ids=set(facts.eos_token_ids),
            drafter=drafter,
            num_speculative_tokens=k,
        ).token_ids
        assert got == expected


def test_template_options_reach_every_rendering_and_the_digest(tmp_path: Path) -> None:
    folder = make_tiny_target(
        tmp_path / "target",
        chat_template="{% if not enable_thinking is defined or enable_thinking %}T{% endif %}" + CHATML,
    )
    found = {}
    for name, options in (("default", {}), ("off", {"enable_thinking": False}), ("on", {"enable_thinking": True})):
        target = Target(source=f"file:{folder}", template_options=options)
        found[name] = fetch.read_checkpoint(target, folder, tmp_path / "cache")
    texts = {
        name: load_tokenizer(facts, tmp_path / "cache").apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False
        )
        for name, facts in found.items()
    }
    assert texts["default"] == texts["on"] == "T" + texts["off"]
    assert len({facts.template_digest for facts in found.values()}) == 3
    stale = found["off"].model_copy(update={"template_options": {}})
    with pytest.raises(UserError, match=r"chat template of .* changed since it was fetched"):
        load_tokenizer(stale, tmp_path / "cache")
