"""Verification: exact for greedy, distribution-preserving for sampling, for chains and trees."""

import numpy as np
import pytest
import torch

from specflow.decoding.sampling import GREEDY, Dense, Sampling
from specflow.decoding.verify import NOTHING, Proposal, verify
from tests.decoding import fits

V, K, NUM_SEQUENCES, LENGTH = 4, 3, 4000, 3
TARGET_IDS = torch.tensor([0, 1, 3])  # the draft does not know token 2


def sampled(tokens: list[int], probs: torch.Tensor, target_ids: torch.Tensor) -> Proposal:
    """A chain whose token i was drawn from row i of `probs` [K, D]."""
    return Proposal(tokens, draws=[Dense(row, target_ids) for row in probs])


def logits_of(choices: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), 10).float()


@pytest.mark.parametrize(("wrong_at", "accepted"), [(0, 0), (1, 1), (2, 2), (None, 3)])
def test_greedy_accepts_until_the_first_mismatch(wrong_at: int | None, accepted: int) -> None:
    choices = [5, 6, 7, 8]
    drafted = choices[:3]
    if wrong_at is not None:
        drafted[wrong_at] = 0
    verdict = verify(Proposal(drafted), logits_of(choices), GREEDY, None)
    assert (verdict.path, verdict.accepted) == (list(range(accepted)), accepted)
    assert verdict.next_token == choices[accepted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_greedy(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]], dtype=dtype)
    verdict = verify(Proposal([1]), logits, GREEDY, None)
    assert (verdict.accepted, verdict.next_token) == (1, 0)


def test_a_match_after_a_mismatch_does_not_count() -> None:
    assert verify(Proposal([0, 6, 7]), logits_of([5, 6, 7, 8]), GREEDY, None).accepted == 0


@pytest.mark.parametrize(
    ("choices", "path", "next_token"),
    [
        ([5, 0, 0, 0, 0, 9], [], 5),
        ([2, 0, 8, 0, 0, 0], [1], 8),
        ([2, 0, 4, 0, 0, 9], [1, 4], 9),  # node 4 hangs on node 1
        ([1, 4, 0, 0, 0, 0], [0], 4),  # node 4 holds the token but hangs elsewhere
        ([1, 3, 0, 7, 0, 0], [0, 2], 7),
        ([1, 3, 0, 6, 9, 0], [0, 2, 3], 9),
    ],
)
def test_greedy_follows_the_branch_that_the_target_takes(choices: list[int], path: list[int], next_token: int) -> None:
    """Root -> 0 (token 1), 1 (token 2); 0 -> 2 (token 3); 2 -> 3 (token 6); 1 -> 4 (token 4)."""
    verdict = verify(Proposal([1, 2, 3, 6, 4], [-1, -1, 0, 2, 1]), logits_of(choices), GREEDY, None)
    assert (verdict.path, verdict.next_token) == (path, next_token)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1e-3)])
def test_empty_proposal_is_plain_decoding(sampling: Sampling) -> None:
    assert verify(NOTHING, logits_of([7]), sampling, torch.Generator()).next_token == 7


def test_sampling_never_accepts_what_the_target_excludes() -> None:
    logits = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2).log()
    truncated = torch.tensor([[0.3, 0.3, 0.2, 0.2]] * 2).log()
    certain = torch.tensor([[0.0, 0.0, 1.0]])
    for seed in range(50):
        for rows, sampling in (
            (logits, Sampling(1.0)),
            (truncated, Sampling(1.0, 1.0, 2)),
            (truncated, Sampling(1, 0.55)),
        ):
            for proposal in (Proposal([2]), sampled([3], certain, TARGET_IDS)):
                verdict = verify(proposal, rows, sampling, torch.Generator().manual_seed(seed))
                assert verdict.accepted == 0 and verdict.next_token in (0, 1)


def test_sampling_always_accepts_equal_distributions() -> None:
    probs = torch.tensor([0.2, 0.3, 0.4, 0.1])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        token = int(torch.multinomial(probs, 1, generator=generator))
        proposal = sampled([token], probs[None], torch.arange(4))
        assert verify(proposal, probs.repeat(2, 1).log(), Sampling(1.0), generator).accepted == 1


def test_half_of_what_the_draft_overrates_is_rejected() -> None:
    """Draft 0.8 where the target gives 0.4: accepted half of the time, and what is left names the other token."""
    target, own = torch.tensor([[0.4, 0.6]] * 2), torch.tensor([[0.8, 0.2]])
    generator = torch.Generator().manual_seed(0)
    proposal = sampled([0], own, torch.arange(2))
    verdicts = [verify(proposal, target.log(), Sampling(1.0), generator) for _ in range(2000)]
    assert abs(np.mean([verdict.accepted for verdict in verdicts]) - 0.5) < 0.04
    assert {verdict.next_token for verdict in verdicts if not verdict.accepted} == {1}


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by last token: the target's [V, V] and the draft's [V, D], which are related."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(V, V, generator=generator)
    return target, target[:, TARGET_IDS] + 0.7 * torch.randn(V, 3, generator=generator)


def draft(kind: str, last: int, logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Proposal:
    """A proposal of depth K after `last`."""
    if kind == "lookup":
        return Proposal([(last + 1 + i) % V for i in range(K)])
    tokens: list[int] = []
    if kind == "sampled chain":
        draws = []
        for _ in range(K):
            token, drawn_from = sampling.draft(logits[last], TARGET_IDS, generator)
            last = int(token)
            tokens.append(last)
            draws.append(drawn_from)
        return Proposal(tokens, draws=draws)
    parents, reached = [], []
    probs = torch.softmax(logits, -1)
    level = [(-1, last, 1.0)]
    for _ in range(K):  # two branches at each node: the whole tree
        grown = []
        for parent, token, chance in level:
            for draft_id in probs[token].topk(2).indices.tolist():
                grown.append((len(tokens), int(TARGET_IDS[draft_id]), chance * float(probs[token, draft_id])))
                tokens.append(grown[-1][1])
                parents.append(parent)
                reached.append(grown[-1][2])
        level = grown
    if kind == "static tree":
        return Proposal(tokens, parents)
    kept = sorted(sorted(range(len(tokens)), key=lambda node: -reached[node])[:6])  # stable: a parent is no later
    return Proposal([tokens[n] for n in kept], [-1 if parents[n] < 0 else kept.index(parents[n]) for n in kept])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7), Sampling(1.2, 0.8), Sampling(0.9, 1.0, 2), Sampling(1.0, 0.9, 3)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sampled chain", "lookup", "static tree", "dynamic tree"])
def test_sampling_is_lossless(kind: str, sampling: Sampling) -> None:
    """Joint distribution of the first three tokens after token 0, against the target's own chain: chi-square."""
    target_logits, draft_logits = tables()
    generator = torch.Generator().manual_seed(12)
    observed = np.zeros((V,) * LENGTH)
    lengths = []
    for _ in range(NUM_SEQUENCES):
        sequence = [0]
        while len(sequence) < 1 + LENGTH:
            proposal = draft(kind, sequence[-1], draft_logits, sampling, generator)
            logits = target_logits[[sequence[-1], *proposal.token_ids]]
            verdict = verify(proposal, logits, sampling, generator)
            sequence += [*(proposal.token_ids[node] for node in verdict.path), verdict.next_token]
            lengths.append(verdict.accepted)
        observed[tuple(sequence[1 : 1 + LENGTH])] += 1

    def expected(sampling: Sampling) -> np.ndarray:
        p = sampling.probabilities(target_logits).double().numpy()
        return np.einsum("a,ab,bc->abc", p[0], p, p)

    exact = expected(sampling)
    assert {0, 1} < set(lengths), "rejections and accepted paths of several tokens were both seen"
    assert observed[exact == 0].sum() == 0
    assert fits(observed, exact) > 1e-3
    assert fits(observed, expected(Sampling(1.5 * sampling.temperature))) < 1e-6, "can tell distributions apart"
