"""Rows of summary.json's `batch`: the same requests at every batch size, losses disclosed."""

import pytest
import torch

from specflow.bench import batched
from specflow.bench.batched import Workload, measure
from specflow.decoding.generate import Generation
from specflow.decoding.sampling import GREEDY, Sampling
from specflow.targets.attention import optimise_for_inference
from tests.decoding import make_draft, make_llama, make_target

V = 12
PROMPTS = [[1, 4, 2], [7, 7, 3, 0, 5, 9, 11, 2, 4], [6], [3, 8, 1, 1, 10], [2, 2, 2, 2, 9, 5]]


def work(sampling: Sampling) -> Workload:
    return Workload(PROMPTS, 20, frozenset(), 2, sampling, seed=3)


def test_rows_of_each_batch_size() -> None:
    model = optimise_for_inference(make_llama(V))
    rows = measure(model, make_draft(V), work(GREEDY), batch_sizes=[1, 8], repeats=2)
    assert [row.batch_size for row in rows] == [1, 8]
    assert len({row.acceptance_length for row in rows}) == 1  # what is accepted does not depend on the neighbours
    for row in rows:
        assert row.num_requests == 5 and row.num_speculative_tokens == 2
        assert row.lossless_rate == 1.0 and row.first_divergence is None
        assert 1.0 < row.acceptance_length < 3.0
        assert row.speedup == pytest.approx(row.tok_s / row.baseline_tok_s)
    sampled = measure(model, make_draft(V), work(Sampling(1.0)), batch_sizes=[4], repeats=1)[0]
    assert sampled.lossless_rate is None and sampled.first_divergence is None


def test_speed_is_tokens_over_the_wall_time_of_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gains a second at each reading: each pass lasts one."""
    readings = iter(range(10_000))
    monkeypatch.setattr(batched, "clock_of", lambda device: lambda: next(readings))
    row = measure(optimise_for_inference(make_llama(V)), make_draft(V), work(GREEDY), batch_sizes=[3], repeats=2)[0]
    assert row.tok_s == row.baseline_tok_s == 5 * 20 and row.speedup == 1.0


def test_what_differs_is_disclosed() -> None:
    """The share of equal answers, and the first other one with the logits between the two tokens."""
    target = make_target(make_llama(V), num_rows=2)
    same = [Generation([1, 2, 3]) for _ in PROMPTS]
    other = [Generation([1, 2, 3]) for _ in PROMPTS]
    other[3] = Generation([1, 5, 3])
    baseline, draft = (batched._Side(None, 1.0, [same, same]), batched._Side(None, 1.0, [other, same]))
    rate, first = batched._losslessness(target, work(GREEDY), baseline, draft)
    assert rate == pytest.approx(0.9) and first is not None
    with torch.inference_mode():
        logits = make_llama(V)(torch.tensor([[*PROMPTS[3], 1]])).logits[0, -1]
    assert first.margin == pytest.approx(float(logits[2] - logits[5]), abs=1e-4)
    assert (first.request, first.position, first.expected, first.got) == (3, 1, 2, 5)
