"""Temperature, top-k and top-p: transformers' warpers say what they mean."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specflow.decoding.sampling import GREEDY, Dense, Few, Sampling, draw


def warped(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """What transformers samples from, in generate()'s order."""
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    logits = TemperatureLogitsWarper(temperature)(ids, logits)
    if top_k:
        logits = TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(ids, logits)
    return torch.softmax(logits, -1)


@pytest.mark.parametrize("vocab_size", [7, 3000])
@pytest.mark.parametrize("width", [0.1, 3.0])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 5), (1.3, 0.9, 0), (1.0, 0.95, 5), (0.7, 0.5, 700), (1.0, 0.01, 0), (1.0, 0.999, 0)],
)
def test_probabilities_are_those_of_transformers(
    vocab_size: int, width: float, temperature: float, top_p: float, top_k: int
) -> None:
    """Flat and peaked distributions, a vocabulary smaller than top_k, one row and several."""
    logits = width * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    got = Sampling(temperature, top_p, top_k).probabilities(logits)
    expected = warped(logits, temperature, top_p, top_k)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)
    assert torch.equal(logits, before)
    torch.testing.assert_close(Sampling(temperature, top_p, top_k).probabilities(logits[0]), got[0])


def test_half_precision_logits_are_sampled_in_single_precision() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = Sampling(0.7, 0.9, 10).probabilities(logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, Sampling(0.7, 0.9, 10).probabilities(logits.float()))


def test_equals_at_the_edge_stay_together() -> None:
    """Else the choice among them would hang on the order of a sort, which may differ between one row and many."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    assert (Sampling(1.0, 1.0, 2).probabilities(logits)[0] > 0).tolist() == [False, True, True, True, True]
    assert (Sampling(1.0, 0.6, 0).probabilities(logits)[0] > 0).tolist() == [False, True, True, True, True]


def test_greedy_is_temperature_zero() -> None:
    assert GREEDY.greedy and Sampling().greedy and not Sampling(0.1).greedy


def test_draw_follows_its_weights() -> None:
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 4.0])  # not normalised
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(weights.expand(8000, 5), generator), minlength=5)
    assert counts[0] == counts[3] == 0
    assert chisquare(counts[[1, 2, 4]].numpy(), [3000, 1000, 4000]).pvalue > 1e-3


def defined(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The definition over a whole row [V]: sort, sum in double precision, cut what is less likely than the last one."""
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < scores.sort(descending=True).values[sampling.top_k - 1]] = float("-inf")
    probs = torch.softmax(scores, -1).double()
    if sampling.top_p < 1.0:
        likely = probs.sort(descending=True).values
        probs[probs < likely[min(int((likely.cumsum(0) < sampling.top_p).sum()), len(likely) - 1)]] = 0.0
    return probs / probs.sum()


def likelier(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probability of all tokens before each one [V], after top-k: what top-p is compared with."""
    probs = defined(logits, Sampling(sampling.temperature, 1.0, sampling.top_k))
    order = probs.argsort(descending=True)
    return torch.empty_like(probs).index_copy_(0, order, probs[order].cumsum(0) - probs[order])


def row(kind: str, vocab_size: int) -> torch.Tensor:
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    return {
        "peaked": 4.0 * noise,
        "flat": 0.01 * noise,
        "equal": torch.zeros(vocab_size),
        "one hot": torch.full((vocab_size,), -float("inf")).index_fill_(0, torch.tensor([vocab_size // 2]), 0.0),
        "ties": (3.0 * noise).round(),  # some tens of tokens share a value
        "two levels": (torch.arange(vocab_size) % 3 == 0).float(),
    }[kind]


@pytest.mark.parametrize("vocab_size", [2, 7, 129, 3000, 4096, 4097])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "one hot", "ties", "two levels"])
def test_a_few_tokens_tell_what_the_whole_row_does(kind: str, vocab_size: int) -> None:
    """`distribution` on a CPU, `probabilities` and the definition agree, whatever is cut and wherever equals lie."""
    logits = row(kind, vocab_size)
    for top_p in (1e-6, 0.3, 0.61, 0.9, 0.9995, 0.9999, 1.0):
        for top_k in (0, 1, 2, 5, 50, vocab_size - 1, vocab_size, vocab_size + 1):
            sampling = Sampling(0.8, top_p, top_k)
            expected, found = defined(logits, sampling), sampling.distribution(logits)
            got = torch.zeros(vocab_size).index_copy_(0, *found.pairs())
            for mine in (got, sampling.probabilities(logits)):
                differ = (mine > 0) != (expected > 0)
                # only where the sum meets top_p to single precision, which rounds by the processor
                assert (likelier(logits, sampling)[differ] - top_p).abs().lt(1e-5).all(), sampling
                atol = 1e-9 + float(torch.maximum(mine.double(), expected)[differ].sum())
                torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=atol)
            token = int(logits.argmax())
            assert found.of(token) == pytest.approx(float(expected[token]), rel=1e-5)


def test_a_peaked_distribution_is_few_numbers_and_a_flat_one_a_whole_row() -> None:
    assert isinstance(Sampling(0.8, 0.9).distribution(row("peaked", 3000)), Few)
    assert isinstance(Sampling(0.8, 0.9).distribution(row("flat", 5000)), Dense), "all are unlikely"
    likely = Sampling(0.8, 1.0, 2).distribution(row("two levels", 3000))
    assert isinstance(likely, Few) and len(likely.ids) == 1000, "all are as likely as the second"
    assert isinstance(Sampling(0.8).distribution(row("peaked", 3000)), Dense)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, 0.97), Sampling(1.0, 1.0, 3)], ids=str)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Of the target and of a draft that knows some of its tokens; nothing is drawn that has no probability."""
    logits = torch.tensor([1.0, -float("inf"), 2.0, 0.5, -6.0, 1.5, -float("inf")])
    target_ids, generator, num = torch.tensor([3, 4, 8, 9, 10, 12, 15]), torch.Generator().manual_seed(0), 4000
    expected = defined(logits, sampling)
    kept = expected > 0
    drawn = [sampling.draft(logits, target_ids, generator) for _ in range(num)]
    own = sampling.distribution(logits)
    for tokens in (
        torch.tensor([own.draw(generator) for _ in range(num)]),
        torch.searchsorted(target_ids, torch.cat([token for token, _ in drawn])),
    ):
        counts = torch.bincount(tokens, minlength=7)
        assert counts[~kept].sum() == 0
        assert chisquare(counts[kept].numpy(), num * expected[kept].numpy()).pvalue > 1e-3
    ids, probs = drawn[0][1].pairs()
    torch.testing.assert_close(torch.zeros(16).index_copy_(0, ids, probs)[target_ids].double(), expected)


def test_a_flat_draft_is_drawn_from_the_whole_row() -> None:
    token, drawn_from = Sampling(1.0, 0.9).draft(torch.zeros(5000), torch.arange(5000, 10000), torch.Generator())
    ids, probs = drawn_from.pairs()
    assert isinstance(drawn_from, Dense) and ids[0] == 5000 and len(ids) == 5000
    assert drawn_from.of(int(token)) == pytest.approx(1 / 5000) and float(probs.sum()) == pytest.approx(1.0)


def test_a_draft_tells_what_it_was_drawn_from_where_top_p_is_cut_short() -> None:
    """Two tokens have 0.3 each, many the rest: too unlikely to be looked at, and needed to reach 0.9."""
    for num_others, kind in ((5000, Dense), (500, Few)):  # below LEAST_LIKELY, and between it and LEAST_DRAFTED
        logits = torch.cat((torch.full((2,), 0.3), torch.full((num_others,), 0.4 / num_others))).log()
        _, drawn_from = Sampling(1.0, 0.9).draft(logits, torch.arange(1, num_others + 3), torch.Generator())
        assert drawn_from == Few([0.5, 0.5], [1, 2])
        assert isinstance(Sampling(1.0, 0.9).distribution(logits), kind)


def test_a_draft_takes_no_more_than_top_k_of_equals() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])
    _, drawn_from = Sampling(1.0, 1.0, 2).draft(logits, torch.arange(5), torch.Generator())
    ids, probs = drawn_from.pairs()
    assert len(ids) == 2 and ids[0] == 1 and probs.tolist() == pytest.approx([0.7311, 0.2689], abs=1e-4)
    assert len(Sampling(1.0, 1.0, 2).distribution(logits).pairs()[0]) == 4


@pytest.mark.parametrize("own", ["few", "whole row"])
@pytest.mark.parametrize("other", ["few", "whole row"])
def test_what_is_left_of_a_distribution(own: str, other: str) -> None:
    target = Few([0.5, 0.3, 0.2], [2, 0, 4]) if own == "few" else Dense(torch.tensor([0.3, 0.0, 0.5, 0.0, 0.2]))
    ids, probs = [4, 2, 1], [0.6, 0.1, 0.3]
    draft = Few(probs, ids) if other == "few" else Dense(torch.tensor(probs), torch.tensor(ids))
    left = target.minus(draft)
    assert [left.of(token) for token in range(5)] == pytest.approx([0.3, 0.0, 0.4, 0.0, 0.0])
    assert left.total() == pytest.approx(0.7)
    assert [draft.of(token) for token in range(5)] == pytest.approx([0.0, 0.3, 0.1, 0.0, 0.6])
    assert {left.draw(torch.Generator().manual_seed(seed)) for seed in range(40)} == {0, 2}
