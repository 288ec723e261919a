"""Chain drafting: alignment of rows, forgetting of speculative rows, honest probabilities."""

import pytest
import torch

from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.sampling import GREEDY, Sampling
from tests.decoding import H, Scratch, V, make_draft, sequence

D = 16


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(4))


def make_chain(table: torch.Tensor) -> ChainDrafter:
    return ChainDrafter(Eagle3Session(make_draft(draft_vocab_size=D), table, 128))


def test_incremental_chain_equals_one_from_scratch(table: torch.Tensor) -> None:
    """Growing by several tokens at a time, speculative rows forgotten in between."""
    draft = make_draft(draft_vocab_size=D)
    history, aux = sequence(30)
    chain = make_chain(table)
    known = 7
    chain.start(history[: known + 1], aux[:known])
    new = aux[known - 1 : known]
    for grow in [1, 4, 2, 3, 1, 4]:
        proposal = chain.propose(history[: known + 1], new, 4, GREEDY, None)
        assert proposal.token_ids == Scratch(draft, table, history[: known + 1], aux[:known]).chain(4)
        assert all(draft.t2d[token] for token in proposal.token_ids)
        new, known = aux[known : known + grow], known + grow


def test_start_forgets_the_previous_sequence(table: torch.Tensor) -> None:
    chain = make_chain(table)
    history, aux = sequence(12)
    proposals = []
    for _ in range(2):
        chain.start(history, aux)
        proposals.append(chain.propose(history, aux[-1:], 3, GREEDY, None).token_ids)
    assert proposals[0] == proposals[1]


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(0.7, 0.8, 6)], ids=str)
def test_sampled_tokens_come_from_the_probabilities_handed_over(table: torch.Tensor, sampling: Sampling) -> None:
    chain, draft = make_chain(table), make_draft(draft_vocab_size=D)
    history, aux = sequence(12)
    generator = torch.Generator().manual_seed(1)
    chain.start(history, aux)
    counts, num = torch.zeros(V), 3000
    for _ in range(num):
        chain.session.verified = 10  # as before the proposal
        proposal = chain.propose(history, aux[-1:], 1, sampling, generator)
        counts[proposal.token_ids[0]] += 1
    (drawn_from,) = proposal.draws
    expected = torch.zeros(V).scatter_(0, *drawn_from.pairs())
    scratch = sampling.probabilities(Scratch(draft, table, history, aux).logits([]))
    torch.testing.assert_close(expected[draft.d2t + torch.arange(D)], scratch)
    assert float((counts / num - expected).abs().max()) < 0.04
    assert float(expected[~draft.t2d].sum()) == 0.0 and float(counts[expected == 0].sum()) == 0.0


def test_a_sampled_chain_feeds_back_what_it_sampled(table: torch.Tensor) -> None:
    chain, draft = make_chain(table), make_draft(draft_vocab_size=D)
    history, aux = sequence(12)
    chain.start(history, aux)
    proposal = chain.propose(history, aux[-1:], 4, Sampling(2.0), torch.Generator().manual_seed(3))
    scratch = Scratch(draft, table, history, aux)
    for k in range(4):
        expected = Sampling(2.0).probabilities(scratch.logits(proposal.token_ids[:k]))
        torch.testing.assert_close(proposal.draws[k].pairs()[1], expected, rtol=1e-4, atol=1e-6)
    assert proposal.token_ids != scratch.chain(4), "a greedy chain would prove nothing"
