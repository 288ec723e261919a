"""The decoding loop on a tiny random Llama: greedy speculation equals greedy decoding, and the accounting adds up."""

from collections.abc import Sequence

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from specflow.decoding.chain import ChainDrafter
from specflow.decoding.generate import Generation, generate
from specflow.decoding.lookup import LookupDrafter
from specflow.decoding.verify import Proposal
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

V, H, AUX = 64, 32, [1, 2, 3]
PROMPT = [5, 9, 2, 40, 7, 7, 31]


def make_model(num_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=num_heads,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # wide enough for the choice to depend on the context
            weight.normal_(0.0, 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    return model


def make_target(max_length: int = 200) -> CachedTarget:
    return CachedTarget(optimise_for_inference(make_model()), num_rows=1, max_length=max_length, aux_layer_ids=AUX)


def make_chain(target: CachedTarget) -> ChainDrafter:
    torch.manual_seed(1)
    config = Eagle3Config(
        hidden_size=H,
        target_hidden_size=H,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        vocab_size=V,
        draft_vocab_size=V,
        aux_layer_ids=AUX,
    )
    return ChainDrafter(Eagle3Draft(config), target.model.get_input_embeddings().weight, target.max_length)


def run(
    target: CachedTarget,
    drafter: object = None,
    *,
    k: int = 3,
    new: int = 40,
    eos: Sequence[int] = (),
    **kwargs: object,
) -> Generation:
    return generate(
        target,
        PROMPT,
        max_new_tokens=new,
        eos_ids=set(eos),
        drafter=drafter,
        num_speculative_tokens=k if drafter else 0,
        **kwargs,
    )


class KnownDrafter:
    """Drafts the known continuation, spoilt from position `wrong_at` on."""

    def __init__(self, answer: list[int], wrong_at: int) -> None:
        self.answer, self.wrong_at = answer, wrong_at

    def start(self, history: Sequence[int], aux: torch.Tensor | None) -> None:
        assert aux is not None and len(aux) == len(history) - 1

    def propose(self, history: Sequence[int], aux: torch.Tensor, num_tokens: int, *_: object) -> Proposal:
        at = len(history) - len(PROMPT)
        drafted = (self.answer + [0] * num_tokens)[at : at + num_tokens]
        return Proposal([token if i < self.wrong_at else (token + 1) % V for i, token in enumerate(drafted)])


def test_plain_greedy_equals_transformers_generate() -> None:
    model = make_model()
    config = GenerationConfig(do_sample=False, max_new_tokens=40, pad_token_id=0)
    expected = model.generate(torch.tensor([PROMPT]), generation_config=config)[0, len(PROMPT) :].tolist()
    result = run(make_target())
    assert result.token_ids == expected and result.finish_reason == "length"
    assert result.steps == [(0, 0)] * 39


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_greedy_speculation_equals_plain_greedy(k: int) -> None:
    target = make_target()
    plain = run(target, new=60).token_ids
    for drafter in (make_chain(target), LookupDrafter()):
        result = run(target, drafter, k=k, new=60)
        assert result.token_ids == plain
        assert len(plain) == 1 + sum(accepted + 1 for _, accepted in result.steps) - result.num_cut


def test_a_target_and_its_drafter_serve_one_sequence_after_another() -> None:
    target = make_target()
    chain = make_chain(target)
    first = [run(target, chain).steps for _ in range(2)]
    assert first[0] == first[1]


@pytest.mark.parametrize(("wrong_at", "length"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_never_sometimes_always(wrong_at: int, length: int) -> None:
    """A draft that is right for i tokens of K = 3 gives acceptance length i + 1: never 1, always K + 1."""
    target = make_target()
    plain = run(target, new=80).token_ids
    result = run(target, KnownDrafter(plain, wrong_at), new=61)
    assert result.token_ids == plain[:61]
    assert {accepted + 1 for _, accepted in result.steps} == {length}
    assert len(result.steps) == -(-60 // length)


@pytest.mark.parametrize("new", range(1, 10))
def test_never_more_than_max_new_tokens(new: int) -> None:
    target = make_target()
    plain = run(target, new=40).token_ids
    result = run(target, KnownDrafter(plain, 3), new=new)
    assert result.token_ids == plain[:new] and result.finish_reason == "length"
    assert new == 1 + sum(accepted + 1 for _, accepted in result.steps) - result.num_cut


def test_nothing_after_the_end_of_turn() -> None:
    target = make_target()
    plain = run(target, new=40).token_ids
    for at in range(8):
        eos = plain[at]
        end = plain.index(eos) + 1
        for drafter in (None, KnownDrafter(plain, 3), KnownDrafter(plain, 1)):
            result = run(target, drafter, new=40, eos=[eos])
            assert result.token_ids == plain[:end] and result.finish_reason == "stop"


def test_prompt_longer_than_the_context_is_one_line() -> None:
    with pytest.raises(UserError, match="prompt of 7 tokens, 40 new and 3 drafted need 50") as caught:
        run(make_target(max_length=49), LookupDrafter())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_speculation_has_the_targets_distribution(temperature: float) -> None:
    """Second token given the first, over many seeds: frequencies against the target's own probabilities."""
    target = make_target()
    chain = make_chain(target)
    generator = torch.Generator().manual_seed(5)
    results = [run(target, chain, new=2, temperature=temperature, generator=generator).token_ids for _ in range(400)]
    target.lengths[0] = 0
    probs = torch.softmax(target.logits(target.forward(torch.tensor([PROMPT]))[0, -1]) / temperature, -1)
    first = max(range(V), key=lambda token: float(probs[token]))
    seconds = [tokens[1] for tokens in results if tokens[0] == first]
    target.lengths[0] = len(PROMPT)
    probs = torch.softmax(target.logits(target.forward(torch.tensor([[first]]))[0, -1]) / temperature, -1)
    frequencies = torch.bincount(torch.tensor(seconds), minlength=V) / len(seconds)
    assert len(seconds) > 40
    assert float((frequencies - probs).abs().max()) < 4 * float(((probs * (1 - probs)) / len(seconds)).sqrt().max())


def test_optimised_forward_equals_the_plain_one() -> None:
    """Prefill, one token, several tokens, and ragged rows: the fused path computes the same function."""
    for heads in (2, 4):
        plain, fast = make_model(heads), optimise_for_inference(make_model(heads))
        for rows in (1, 3):
            pair = [CachedTarget(m, num_rows=rows, max_length=40, aux_layer_ids=AUX) for m in (plain, fast)]
            generator = torch.Generator().manual_seed(2)
            for m, counts in ((9, [9, 4, 6]), (1, None), (4, [4, 2, 3]), (1, None)):
                tokens = torch.randint(0, V, (rows, m), generator=generator)
                counts = counts[:rows] if counts else None
                a, b = (target.forward(tokens, counts=counts) for target in pair)
                for row in range(rows):
                    real = counts[row] if counts else m
                    torch.testing.assert_close(a[row, :real], b[row, :real], atol=2e-5, rtol=1e-4)
                    torch.testing.assert_close(
                        pair[0].aux()[row, :real], pair[1].aux()[row, :real], atol=2e-5, rtol=1e-4
                    )
