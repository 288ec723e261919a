"""What the tuner predicts: closed forms of acceptance, costs between measured ones, a pruning that keeps the best."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from specflow.tune.acceptance import Walkable, acceptance_length, accepted_by_position, chain_length, path_ranks, walk
from specflow.tune.candidates import Candidate, CostModel, Prediction, grid, interpolate, largest_total, predict, prune

COSTS = CostModel(
    target_ms=10.0,
    verify_ms={1: 10.0, 2: 11.0, 4: 12.0, 8: 16.0, 16: 24.0},
    ingest_ms={1: 1.0, 2: 1.2, 4: 1.6},
    step_ms={1: 0.5, 4: 0.8, 8: 1.6},
    tree_ms={1: 0.0, 4: 0.3, 8: 0.3},
)


def chain_ranks(accepted: list[int], depth: int) -> np.ndarray:
    """Ranks of positions where a chain's first `accepted` tokens are right."""
    ranks = np.zeros((len(accepted), depth, depth), dtype=np.int64)
    for t, count in enumerate(accepted):
        for d in range(depth):
            ranks[t, d, : min(count, d + 1)] = np.arange(1, min(count, d + 1) + 1)
    return ranks


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_geometric_acceptance_has_the_known_length(rate: float, k: int) -> None:
    """Each drafted token right with probability a, given those before it: AL(K) = (1 - a**(K+1)) / (1 - a)."""
    expected = (1 - rate ** (k + 1)) / (1 - rate)
    assert chain_length([rate**i for i in range(1, 9)], k) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    accepted = (rng.random((40_000, 8)) < rate).cumprod(axis=1).sum(axis=1)
    answer = Walkable(len(accepted) + 1, chain_ranks(accepted.tolist(), 8))
    assert acceptance_length([answer], Candidate(k)) == pytest.approx(expected, rel=0.02)


def test_a_walk_takes_the_steps_of_decoding() -> None:
    """Positions 0..6 of an answer of 8 tokens; a step from t that accepts n goes on at t + n + 1."""
    answer = Walkable(8, chain_ranks([2, 9, 9, 0, 1, 9, 9], 3))
    assert walk(answer, Candidate(3)) == (4, 6)  # t=0: 2, t=3: 0, t=4: 1, t=6: 3 (one of them beyond the answer)
    assert walk(answer, Candidate(1)) == (4, 4)  # t=0, 2, 4 and 6: 1 each
    assert acceptance_length([answer], Candidate(3)) == 1 + 6 / 4
    assert acceptance_length([Walkable(1, chain_ranks([], 3))], Candidate(3)) == 1.0


def test_ranks_of_a_path_by_hand() -> None:
    r"""A tree of top_k 2: root -> a (.6), b (.3); a -> c (.5), d (.4), b -> c (.9), e (.05)."""
    tokens, parents = [10, 11, 12, 13, 12, 14], [-1, -1, 0, 0, 1, 1]
    probabilities = [0.6, 0.3, 0.6 * 0.5, 0.6 * 0.4, 0.3 * 0.9, 0.3 * 0.05]
    scores = np.log(probabilities).tolist()
    # by probability: a .6, b .3, ac .3 (later in order), bc .27, ad .24, be .015
    assert path_ranks(tokens, parents, scores, [11, 12, 99], 2).tolist() == [[2, 0], [2, 4]]
    assert path_ranks(tokens, parents, scores, [10, 12], 2).tolist() == [[1, 0], [1, 3]]
    assert path_ranks(tokens, parents, scores, [12, 10], 2).tolist() == [[0, 0], [0, 0]]
    ranks = path_ranks(tokens, parents, scores, [11, 12], 2)[None]
    found = {n: int(accepted_by_position(ranks, Candidate(2, 2, n))[0]) for n in (3, 4, 5, 6)}
    assert found == {3: 1, 4: 1, 5: 2, 6: 2}  # the path's second node is the fourth best: 5 tokens with the root


def test_acceptance_never_falls_as_a_tree_grows() -> None:
    rng = random.Random(0)
    positions = []
    for _ in range(60):
        tokens, parents, scores = [], [], []
        level = [(-1, 0.0)]
        for _ in range(3):
            following = []
            for parent, score in level:
                for token in rng.sample(range(6), 3):
                    parents.append(parent)
                    tokens.append(token)
                    scores.append(score - rng.random())
                    following.append((len(tokens) - 1, scores[-1]))
            level = sorted(following, key=lambda node: -node[1])[:3]
        positions.append(path_ranks(tokens, parents, scores, [rng.randrange(6) for _ in range(3)], 3))
    ranks = np.array(positions)
    sizes = [accepted_by_position(ranks, Candidate(3, 3, n)) for n in range(4, largest_total(3, 3) + 1)]
    assert all((small <= large).all() for small, large in itertools.pairwise(sizes))
    assert sizes[0].sum() < sizes[-1].sum()
    depths = [accepted_by_position(ranks, Candidate(d, 3, largest_total(d, 3))) for d in (1, 2, 3)]
    assert all((small <= large).all() for small, large in itertools.pairwise(depths))


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert interpolate(COSTS.verify_ms, 3) == 11.5 and interpolate(COSTS.verify_ms, 12) == 20.0
    assert interpolate(COSTS.verify_ms, 32) == 24.0 + 16 * 1.0
    assert interpolate(COSTS.ingest_ms, 0.5) == 1.0
    assert interpolate({4: 9.0, 8: 7.0}, 100) == 7.0  # noise at the end does not make more rows cheaper
    assert interpolate({5: 3.0}, 1) == interpolate({5: 3.0}, 50) == 3.0


def test_a_prediction_is_its_formula() -> None:
    chain = predict(Candidate(3), 2.0, COSTS)
    assert chain.step_ms == pytest.approx(1.2 + 2 * 0.5 + 12.0)
    assert chain.speedup == pytest.approx(2.0 * 10.0 / 14.2) and chain.tok_s == pytest.approx(2000 / 14.2)
    tree = predict(Candidate(2, 4, 8), 2.0, COSTS)
    assert tree.step_ms == pytest.approx(1.2 + 0.3 + 0.8 + 16.0)
    lengths = np.linspace(1.0, 3.9, 30)
    speedups = [predict(Candidate(3), length, COSTS).speedup for length in lengths]
    assert speedups == sorted(speedups), "more accepted is never predicted to be slower"


def test_the_grid_has_every_chain_once_and_trees_of_sizes_that_they_can_have() -> None:
    found = grid((1, 2, 3), (1, 2, 4), (4, 6, 8, 16), max_nodes=7)
    assert len(found) == len(set(found))
    assert [c for c in found if c.is_chain] == [Candidate(1), Candidate(2), Candidate(3)]
    assert all(c.total_token - 1 <= 7 and c.total_token <= largest_total(c.depth, c.top_k) for c in found)
    trees = [(c.depth, c.top_k, c.total_token) for c in found if not c.is_chain]
    # at most depth * top_k + 1 tokens, more than a chain of this depth
    assert trees == [(1, 4, 4), (2, 2, 4), (2, 4, 4), (2, 4, 6), (2, 4, 8), (3, 2, 6), (3, 4, 6), (3, 4, 8)]
    assert grid((4,), (1, 2), (8,), max_nodes=3) == []


def test_pruning_keeps_the_known_best() -> None:
    """Over random cost tables and acceptance: the best stays first; with errors of 5 % it stays among those kept."""
    rng = random.Random(1)
    candidates = grid(range(1, 7), (1, 2, 4), (4, 8, 16), max_nodes=15)
    for _ in range(200):
        costs = CostModel(
            target_ms=10.0,
            verify_ms={n: 10.0 + rng.random() * n for n in (1, 2, 4, 8, 16)},
            ingest_ms={1: rng.random()},
            step_ms={1: 3 * rng.random(), 4: 3 * rng.random()},
            tree_ms={1: 0.0, 4: rng.random()},
        )
        rate = rng.random()
        truth = [predict(c, 1 + sum(rate**i for i in range(1, c.depth + 1)), costs) for c in candidates]
        best = max(truth, key=lambda p: p.speedup)
        kept = prune(truth, keep=6)
        assert kept[0].speedup == best.speedup and len(kept) <= 6
        assert {p.candidate.is_chain for p in kept} == {True, False}
        off = [
            Prediction(p.candidate, p.acceptance_length, p.step_ms, p.speedup * rng.uniform(0.95, 1.05)) for p in truth
        ]
        assert best.candidate in {p.candidate for p in prune(off, keep=len(off))}


def test_pruning_prefers_other_shapes_to_other_sizes() -> None:
    def of(candidate: Candidate, speedup: float) -> Prediction:
        return Prediction(candidate, 2.0, 10.0, speedup)

    sizes = [of(Candidate(4, 4, n), 2.0 - 0.001 * n) for n in (6, 8, 12, 16)]
    others = [of(Candidate(2), 1.9), of(Candidate(3), 1.8), of(Candidate(3, 2, 6), 1.7), of(Candidate(8), 0.9)]
    kept = [p.candidate for p in prune([*sizes, *others], keep=5)]
    assert kept == [Candidate(4, 4, 6), Candidate(4, 4, 8), Candidate(2), Candidate(3), Candidate(3, 2, 6)]
    assert prune([], keep=3) == []
