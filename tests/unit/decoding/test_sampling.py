"""Temperature, top-k and top-p: transformers' warpers say what they mean."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specflow.decoding.sampling import GREEDY, Sampling, draw


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
