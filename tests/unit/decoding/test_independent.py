"""An independent draft model: its cache rolled back, its own distribution handed over, another vocabulary refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from specflow.decoding.generate import generate
from specflow.decoding.independent import IndependentDrafter, load_assistant
from specflow.decoding.sampling import GREEDY, Sampling
from specflow.errors import UserError
from tests.decoding import make_llama, make_target
from tests.toys import make_tiny_target, make_tiny_tokenizer

V, PROMPT = 64, [5, 9, 2, 40, 7, 7, 31]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, top_p=0.9, top_k=20)])
def test_the_target_as_its_own_draft_is_always_accepted(sampling: Sampling) -> None:
    target, k = make_target(make_llama(V)), 3
    done = generate(
        target,
        PROMPT,
        max_new_tokens=41,
        eos_ids=set(),
        drafter=IndependentDrafter(make_llama(V), target.max_length),
        num_speculative_tokens=k,
        sampling=sampling,
        generator=torch.Generator().manual_seed(1),
    )
    assert done.steps == [(k, k)] * 10 and done.num_cut == 0
    if sampling.greedy:
        assert done.token_ids == generate(target, PROMPT, max_new_tokens=41, eos_ids=set()).token_ids


@pytest.mark.parametrize("k", [1, 2, 4])
def test_rollback_equals_a_fresh_prefill(k: int) -> None:
    """Every proposal over a request is the one of a drafter that starts with the same history, none accepted or all."""
    target = make_target(make_llama(V))
    kept, fresh = (IndependentDrafter(make_llama(V, noise=0.04), target.max_length) for _ in range(2))
    compared = []

    class Both:
        def start(self, history, aux):
            kept.start(history, aux)

        def max_nodes(self, num_tokens):
            return kept.max_nodes(num_tokens)

        def propose(self, history, aux, num_tokens, sampling, generator):
            fresh.start(history, aux)
            expected = fresh.propose(history, aux, num_tokens, sampling, generator)
            proposal = kept.propose(history, aux, num_tokens, sampling, generator)
            length = kept.target.lengths[0]
            assert length == fresh.target.lengths[0] == len(history) + num_tokens - 1
            for ours, theirs in zip(kept.target._cache.layers, fresh.target._cache.layers, strict=True):
                torch.testing.assert_close(ours.keys[:, :, :length], theirs.keys[:, :, :length], atol=1e-4, rtol=1e-4)
            compared.append((proposal.token_ids, expected.token_ids))
            return proposal

    plain = generate(target, PROMPT, max_new_tokens=60, eos_ids=set())
    done = generate(target, PROMPT, max_new_tokens=60, eos_ids=set(), drafter=Both(), num_speculative_tokens=k)
    assert done.token_ids == plain.token_ids
    assert all(ours == theirs and len(ours) == k for ours, theirs in compared)
    assert {accepted for _, accepted in done.steps} >= {0, k}


def test_sampling_with_an_independent_draft_is_lossless() -> None:
    """Joint distribution of the second and third token, summed over the first, against the target's own: chi-square."""
    vocab, num_sequences, prompt = 4, 700, [1, 3]
    sampling = Sampling(0.9)
    model = make_llama(vocab, num_layers=2, spread=0.7)
    with torch.inference_mode():

        def probs_after(temperature: float) -> np.ndarray:
            joint = np.zeros((vocab, vocab))
            one = [[*prompt, a, b] for a in range(vocab) for b in range(vocab)]
            logits = model(torch.tensor(one)).logits[:, 1:]
            p = torch.softmax(logits / temperature, -1).double().reshape(vocab, vocab, 3, vocab).numpy()
            for a in range(vocab):
                for b in range(vocab):
                    joint[b] += p[a, b, 0, a] * p[a, b, 1, b] * p[a, b, 2]
            return joint

        exact, other = probs_after(0.9), probs_after(1.8)
    target = make_target(model, max_length=16)
    drafter = IndependentDrafter(make_llama(vocab, seed=5, num_layers=1, spread=0.7), 16)
    generator = torch.Generator().manual_seed(3)
    observed, accepted = np.zeros((vocab, vocab)), []
    for _ in range(num_sequences):
        done = generate(
            target,
            prompt,
            max_new_tokens=3,
            eos_ids=set(),
            drafter=drafter,
            num_speculative_tokens=2,
            sampling=sampling,
            generator=generator,
        )
        observed[done.token_ids[1], done.token_ids[2]] += 1
        accepted += [count for _, count in done.steps]
    assert abs(exact.sum() - 1) < 1e-5 and 0.2 < np.mean(accepted) < 1.8  # both outcomes were exercised
    assert chisquare(observed.ravel(), exact.ravel() / exact.sum() * num_sequences).pvalue > 1e-3
    assert chisquare(observed.ravel(), other.ravel() / other.sum() * num_sequences).pvalue < 1e-6


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
@pytest.mark.parametrize("own", [V - 4, V + 16])
def test_rows_that_pad_a_vocabulary_are_never_proposed(own: int, sampling: Sampling) -> None:
    """A draft model whose table is longer or shorter than the target's, same tokens: ids beyond either do not come."""
    model = make_llama(own, seed=3)
    model.lm_head.weight[min(own, V) :] = model.lm_head.weight[0] * 100  # would always win
    target = make_target(make_llama(V))
    drafter = IndependentDrafter(model, target.max_length, vocab_size=V)
    drafter.start([1, 2, 3], None)
    proposal = drafter.propose([1, 2, 3], None, 4, sampling, torch.Generator().manual_seed(0))
    assert len(proposal.token_ids) == 4 and max(proposal.token_ids) < min(own, V)
    # the loop verifies them against logits of the target's width
    generate(
        target,
        PROMPT,
        max_new_tokens=8,
        eos_ids={*range(own, V)},
        drafter=drafter,
        num_speculative_tokens=2,
        sampling=sampling,
    )


def test_another_vocabulary_is_one_line(tmp_path: Path) -> None:
    same = make_tiny_target(tmp_path / "same", num_hidden_layers=2)
    tokenizer = make_tiny_tokenizer()
    model = load_assistant(same, tokenizer, 300, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2
    other = make_tiny_target(tmp_path / "other", vocab_size=280, num_hidden_layers=2)
    with pytest.raises(
        UserError, match=r"digest [0-9a-f]{12}, 280 ids\) than the target \(digest [0-9a-f]{12}, 300 ids"
    ) as e:
        load_assistant(other, tokenizer, 300, dtype=torch.float32)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_assistant(tmp_path, tokenizer, 300, dtype=torch.float32)
    (same / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="does not load") as e:
        load_assistant(same, tokenizer, 300, dtype=torch.float32)
    assert "\n" not in str(e.value)
