"""Verification: exact for greedy, distribution-preserving for sampling."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from specflow.decoding.verify import NOTHING, Proposal, verify, verify_greedy, verify_sampling

V, K, NUM_SEQUENCES, LENGTH = 4, 3, 5000, 3
TARGET_IDS = torch.tensor([0, 1, 3])  # the draft does not know token 2


def logits_of(choices: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), 10).float()


@pytest.mark.parametrize(("wrong_at", "accepted"), [(0, 0), (1, 1), (2, 2), (None, 3)])
def test_greedy_accepts_until_the_first_mismatch(wrong_at: int | None, accepted: int) -> None:
    choices = [5, 6, 7, 8]
    drafted = choices[:3]
    if wrong_at is not None:
        drafted[wrong_at] = 0
    verdict = verify_greedy(Proposal(drafted), logits_of(choices))
    assert (verdict.accepted, verdict.next_token) == (accepted, choices[accepted])


def test_a_match_after_a_mismatch_does_not_count() -> None:
    assert verify_greedy(Proposal([0, 6, 7]), logits_of([5, 6, 7, 8])).accepted == 0


def test_empty_proposal_is_plain_decoding() -> None:
    assert verify(NOTHING, logits_of([7]), 0.0, None).next_token == 7


def test_sampling_never_accepts_what_the_target_excludes() -> None:
    target_probs = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2)
    for seed in range(50):
        verdict = verify_sampling(Proposal([2]), target_probs, torch.Generator().manual_seed(seed))
        assert verdict.accepted == 0 and verdict.next_token in (0, 1)


def test_sampling_always_accepts_equal_distributions() -> None:
    probs = torch.tensor([0.2, 0.3, 0.4, 0.1])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        token = int(torch.multinomial(probs, 1, generator=generator))
        proposal = Proposal([token], probs[None], torch.arange(4))
        assert verify_sampling(proposal, probs.repeat(2, 1), generator).accepted == 1


def tables(temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Markov target logits [V, V], its probabilities, and draft probabilities [V, D] at that temperature."""
    generator = torch.Generator().manual_seed(3)
    target_logits, draft_logits = torch.randn(V, V, generator=generator), torch.randn(V, 3, generator=generator)
    return target_logits, torch.softmax(target_logits / temperature, -1), torch.softmax(draft_logits / temperature, -1)


def draft(kind: str, last: int, draft_probs: torch.Tensor, generator: torch.Generator) -> Proposal:
    if kind == "lookup":
        return Proposal([(last + 1 + i) % V for i in range(K)])
    tokens, rows = [], []
    for _ in range(K):
        rows.append(draft_probs[last])
        last = int(TARGET_IDS[torch.multinomial(rows[-1], 1, generator=generator)])
        tokens.append(last)
    return Proposal(tokens, torch.stack(rows), TARGET_IDS)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["pruned_vocab", "lookup"])
def test_sampling_is_lossless(kind: str, temperature: float) -> None:
    """Joint distribution of the first three tokens after token 0, against the target's own chain: chi-square."""
    target_logits, target_probs, draft_probs = tables(temperature)
    generator = torch.Generator().manual_seed(11)
    observed = np.zeros((V,) * LENGTH)
    lengths = []
    for _ in range(NUM_SEQUENCES):
        sequence = [0]
        while len(sequence) < 1 + LENGTH:
            proposal = draft(kind, sequence[-1], draft_probs, generator)
            logits = target_logits[[sequence[-1], *proposal.token_ids]]
            verdict = verify(proposal, logits, temperature, generator)
            sequence += [*proposal.token_ids[: verdict.accepted], verdict.next_token]
            lengths.append(verdict.accepted)
        observed[tuple(sequence[1 : 1 + LENGTH])] += 1

    def expected(probs: torch.Tensor) -> np.ndarray:
        p = probs.double().numpy()
        return np.einsum("a,ab,bc->abc", p[0], p, p) * NUM_SEQUENCES

    exact = expected(target_probs)
    assert 0.0 < np.mean(lengths) < K  # both outcomes were exercised
    assert chisquare(observed.ravel(), exact.ravel() * observed.sum() / exact.sum()).pvalue > 1e-3
    other = expected(torch.softmax(target_logits / (1.5 * temperature), -1))  # the test can tell distributions apart
    assert chisquare(observed.ravel(), other.ravel() * observed.sum() / other.sum()).pvalue < 1e-6
