"""The decoding loop on a tiny random Llama: greedy speculation equals greedy decoding, and the accounting adds up."""

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from specflow.config_bench import DynamicTree, StaticTree
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.generate import Drafter, Generation, generate
from specflow.decoding.lookup import LookupDrafter
from specflow.decoding.sampling import Sampling
from specflow.decoding.tree import TreeDrafter
from specflow.decoding.verify import Proposal
from specflow.errors import UserError
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from tests.decoding import AUX, PROMPT, KnownTree, V, fits, make_llama, make_session, make_target

TREES = [
    DynamicTree(total_token=40, depth=4, top_k=16),
    DynamicTree(total_token=8, depth=3, top_k=3),
    StaticTree(branches=[[0], [1], [5], [0, 0], [0, 2], [1, 0], [1, 0, 0], [1, 0, 4]]),
]


def make_chain(target: CachedTarget) -> ChainDrafter:
    return ChainDrafter(make_session(target))


def run(
    target: CachedTarget,
    drafter: Drafter | None = None,
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

    def max_nodes(self, num_tokens: int) -> int:
        return num_tokens

    def propose(self, history: Sequence[int], aux: torch.Tensor, num_tokens: int, *_: object) -> Proposal:
        at = len(history) - len(PROMPT)
        drafted = (self.answer + [0] * num_tokens)[at : at + num_tokens]
        return Proposal([token if i < self.wrong_at else (token + 1) % V for i, token in enumerate(drafted)])


def test_plain_greedy_equals_transformers_generate() -> None:
    model = make_llama()
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


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_greedy_trees_equal_plain_greedy(tree: DynamicTree | StaticTree) -> None:
    target = make_target()
    plain = run(target, new=100).token_ids
    result = run(target, TreeDrafter(make_session(target), tree), k=tree.depth, new=100)
    assert result.token_ids == plain
    assert sum(accepted for _, accepted in result.steps) > 0, "the random draft was right by chance"
    assert len(plain) == 1 + sum(accepted + 1 for _, accepted in result.steps) - result.num_cut
    assert {drafted for drafted, _ in result.steps} == {tree.total_token - 1}


@pytest.mark.parametrize("num_right", [0, 1, 2, None])
def test_the_right_path_through_a_tree_is_found_wherever_it_lies(num_right: int | None) -> None:
    """Random trees with one right path: acceptance is its length, the output plain decoding, step by step."""
    target = make_target()
    plain = run(target, new=120).token_ids
    drafter = KnownTree(PROMPT, plain, num_right)
    result = run(target, drafter, new=100)
    assert result.token_ids == plain[:100]
    assert [accepted for _, accepted in result.steps] == [len(path) for path in drafter.expected]
    if num_right != 0:
        assert any(path != list(range(len(path))) for path in drafter.expected), "keys and values had to move"
    else:
        assert len(result.steps) == 99


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_a_tree_never_sometimes_always(num_right: int) -> None:
    """Root -> 0, 1; 0 -> 2; 1 -> 3, 4; 3 -> 5, the right path 1, 3, 5: right down to depth i gives length i + 1."""
    target = make_target()
    plain = run(target, new=80).token_ids
    result = run(target, KnownTree(PROMPT, plain, num_right, shape=([-1, -1, 0, 1, 1, 3], [1, 3, 5])), new=61)
    assert result.token_ids == plain[:61]
    assert {accepted + 1 for _, accepted in result.steps} == {num_right + 1}
    assert len(result.steps) == -(-60 // (num_right + 1))


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


@pytest.mark.parametrize(
    "tree",
    [None, DynamicTree(total_token=5, depth=2, top_k=2), StaticTree(branches=[[0], [2], [0, 0], [0, 1]])],
    ids=["chain", "dynamic tree", "static tree"],
)
def test_sampled_speculation_has_the_targets_distribution(tree: DynamicTree | StaticTree | None) -> None:
    """Target and draft of 5 tokens: the joint distribution of three tokens, of which a draft of depth 2 proposes the
    second and the third together, against the target's own truncated probabilities: chi-square.
    """
    sampling = Sampling(1.3, 0.97, 4)
    target = make_target(make_llama(5, num_layers=3))
    session = make_session(target, draft_vocab_size=4)
    drafter = ChainDrafter(session) if tree is None else TreeDrafter(session, tree)
    prompt = [3, 1, 4, 1, 2]

    def probabilities(*path: int) -> np.ndarray:
        target.lengths[0] = 0
        logits = target.logits(target.forward(torch.tensor([[*prompt, *path]]))[0, -1])
        return sampling.probabilities(logits).double().numpy()

    exact = np.einsum(
        "a,ab,abc->abc",
        probabilities(),
        np.stack([probabilities(a) for a in range(5)]),
        np.stack([[probabilities(a, b) for b in range(5)] for a in range(5)]),
    )
    generator = torch.Generator().manual_seed(5)
    observed, accepted = np.zeros((5, 5, 5)), []
    for _ in range(300):
        done = generate(
            target,
            prompt,
            max_new_tokens=3,
            eos_ids=(),
            drafter=drafter,
            num_speculative_tokens=2,
            sampling=sampling,
            generator=generator,
        )
        observed[tuple(done.token_ids)] += 1
        accepted += [step[1] for step in done.steps]
    assert {0, 1, 2} <= set(accepted)
    assert observed[exact == 0].sum() == 0
    assert fits(observed, exact) > 1e-3


def test_optimised_forward_equals_the_plain_one() -> None:
    """Prefill, one token, several tokens, and ragged rows: the fused path computes the same function."""
    for heads in (2, 4):
        plain, fast = make_llama(num_heads=heads), optimise_for_inference(make_llama(num_heads=heads))
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


@pytest.mark.parametrize(("k", "calls"), [(0, 2), (1, 4), (3, 8)])
def test_model_time_is_the_calls_of_target_and_draft(monkeypatch: pytest.MonkeyPatch, k: int, calls: int) -> None:
    """By a clock that ticks at each reading, so that a call takes 1. A step: the target's decoder and head; the draft's
    ingestion, k - 1 further rows, k heads. The prompt's forward is no step's.
    """
    target = make_target()
    drafter = make_chain(target) if k else None
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    done = run(target, drafter, k=k, new=20)
    assert done.model_s == calls * len(done.steps)
    assert done.decode_s == done.draft_s + done.verify_s > done.model_s
