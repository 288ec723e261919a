"""The search on a machine that is arithmetic: its clock counts what a cost table says, so every outcome is known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specflow.bench.statistics.records import BASELINE, Record
from specflow.data.prompt_sets import Question
from specflow.errors import UserError
from specflow.results.schema import Conditions, DraftCosts, StepCosts
from specflow.tune.acceptance import Walkable, walk
from specflow.tune.candidates import Candidate, CostModel
from specflow.tune.command import Options as CommandOptions
from specflow.tune.command import lines, of_cut, points, report_of, sentence
from specflow.tune.findings import Found, recommend
from specflow.tune.search import PHASES, Settings, tune
from tests.results import IDENTITY

COSTS = StepCosts(
    target_ms=20.0,
    verify_ms={1: 20.0, 4: 21.0, 8: 23.0, 16: 30.0, 64: 90.0},
    draft_ms=DraftCosts(
        ingest=1.0,
        step=1.0,
        ingest_by_rows={1: 1.0, 4: 1.5},
        step_by_rows={1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4},
        tree_by_rows={1: 0.0, 2: 0.3, 4: 0.3, 8: 0.3},
    ),
    context=100,
)


class Arithmetic:
    """A `Workbench`: `rate(top_k)` is the chance that a level's path goes on, times come from the cost table."""

    def __init__(self, rates: Mapping[int, float], *, costs: StepCosts = COSTS, noise: float = 0.0) -> None:
        self.rates, self.noise, self.table = rates, noise, costs
        self.draft_vocab_size, self.max_new_tokens, self.greedy = 1024, 73, True
        self.conditions = Conditions()
        self.now = 0.0
        self.calls: list[tuple[str, list[str], list[str]]] = []
        self.cut_head = 1.0
        self.cut_rate = 1.0
        self._rng = random.Random(0)

    def clock(self) -> float:
        return self.now

    def can_cut(self) -> bool:
        return self.cut_head < 1.0

    def costs(self, draft_vocab_size: int | None, limit_s: float) -> StepCosts:
        self.now += limit_s
        if draft_vocab_size is None:
            return self.table
        return _scaled(self.table, self.cut_head)

    def _answer(self, question: Question, top_k: int, depth: int, draft_vocab_size: int | None) -> Walkable:
        """The same for everybody who asks: drawn from the question."""
        rng = np.random.default_rng([int(question.question_id), top_k])
        rate = self.rates[top_k] * (self.cut_rate if draft_vocab_size else 1.0)
        right = (rng.random((self.max_new_tokens - 1, 8)) < rate).cumprod(axis=1).astype(bool)[:, :depth]
        ranks = np.zeros((len(right), depth, depth), dtype=np.int64)
        for level in range(depth):
            ranks[:, level, : level + 1] = np.where(right[:, : level + 1], np.arange(1, level + 2) * top_k, 0)
        return Walkable(self.max_new_tokens, ranks)

    def answer(
        self, question: Question, depths: Mapping[int, int], draft_vocab_size: int | None
    ) -> dict[int, Walkable]:
        self.now += 1.5
        return {top_k: self._answer(question, top_k, depth, draft_vocab_size) for top_k, depth in depths.items()}

    def measure(self, candidates: Sequence[Candidate], questions: Sequence[Question], phase: str) -> list[Record]:
        self.calls.append((phase, [c.name for c in candidates], [q.question_id for q in questions]))
        return [self._record(candidate, question, phase) for question in questions for candidate in [None, *candidates]]

    def _record(self, candidate: Candidate | None, question: Question, phase: str) -> Record:
        n = self.max_new_tokens
        steps, step_ms, draft_ms, name, cut = [[0, 0]] * (n - 1), self.table.target_ms, 0.0, BASELINE, 0
        if candidate is not None:
            size = candidate.draft_vocab_size
            answer = self._answer(question, candidate.top_k, candidate.depth, size)
            count, accepted = walk(answer, candidate)
            costs = CostModel.of(self.costs(size, 0.0))
            length = 1 + accepted / count
            draft_ms, step_ms = costs.draft_ms(candidate, length), costs.step_time_ms(candidate, length)
            drafted, left = candidate.total_token - 1, accepted
            steps = []
            for _ in range(count):  # any way to spread them out will do
                steps.append([drafted, min(left, candidate.depth)])
                left -= steps[-1][1]
            cut, name = 1 + count + accepted - n, candidate.name
        seconds = 1e-3 * len(steps) * step_ms * (1 + self.noise * self._rng.uniform(-1, 1))
        self.now += 0.1 + seconds
        return Record(
            set=phase,
            question_id=question.question_id,
            category="chat",
            turn=0,
            repeat=0,
            engine=name,
            order=0,
            num_prompt_tokens=10,
            token_ids=list(range(n)),
            steps=[list(step) for step in steps],
            num_cut=cut,
            prefill_s=0.1,
            draft_s=1e-3 * draft_ms * len(steps),
            verify_s=seconds - 1e-3 * draft_ms * len(steps),
            decode_s=seconds,
            finish_reason="length",
            started_at=1000.0 + self.now,
        )


def _scaled(costs: StepCosts, by: float) -> StepCosts:
    """The draft's part of the costs by a factor."""
    draft = costs.draft_ms
    tables = (draft.ingest_by_rows, draft.step_by_rows, draft.tree_by_rows)
    ingest, step, tree = ({rows: by * ms for rows, ms in table.items()} for table in tables)
    parts = {"ingest_by_rows": ingest, "step_by_rows": step, "tree_by_rows": tree}
    return costs.changed(draft_ms=draft.changed(ingest=by * draft.ingest, step=by * draft.step, **parts))


def questions(count: int, first: int = 0) -> list[Question]:
    return [Question(str(i), "chat", ["?"]) for i in range(first, first + count)]


def run(bench: Arithmetic, budget_s: float = 600.0, max_nodes: int = 31) -> Found:
    return tune(bench, questions(12), questions(24, 100), Settings(budget_s, max_nodes))


EQUAL = dict.fromkeys((1, 2, 4, 8), 0.0)


def test_a_draft_that_is_always_right_wants_the_longest_chain() -> None:
    bench = Arithmetic(dict.fromkeys(EQUAL, 1.0))
    found = run(bench)
    assert found.winner is not None and found.winner.candidate == Candidate(8)
    assert found.winner.pays and found.winner.acceptance_length == 9.0
    chosen = recommend(found)
    assert chosen is not None and chosen.num_speculative_tokens == 8
    assert chosen.sglang is not None and chosen.sglang.model_dump() == {
        "num_steps": 8,
        "eagle_topk": 1,
        "num_draft_tokens": 9,
    }
    # 9 tokens a step of 2.33 + 7 + 23.88 ms instead of 20 ms each, and 0.1 s of prompt on both sides
    assert found.winner.speedup == pytest.approx((0.1 + 72 * 0.02) / (0.1 + 8 * 0.03321), rel=1e-3)
    assert sentence(found).startswith("Pays with a chain of 8: 4.21x (95% CI 4.21 to 4.21) over 24 fresh questions")


def test_a_draft_that_is_never_right_is_not_served() -> None:
    found = run(Arithmetic(EQUAL))
    assert found.winner is not None and found.winner.candidate == Candidate(1)
    assert recommend(found) is not None and recommend(found).model_dump() == {  # type: ignore[union-attr]
        "num_speculative_tokens": 0,
        "sglang": None,
    }
    assert "Does not pay" in sentence(found) and "Serve the target alone" in sentence(found)


def test_the_best_length_of_a_chain_is_found() -> None:
    """With a = 0.6 the cost table's optimum is known by trying all; noise of 3 % does not lead away from it by much."""
    costs = CostModel.of(COSTS)
    rate = 0.6
    speed = {}
    for k in range(1, 9):
        length = (1 - rate ** (k + 1)) / (1 - rate)
        speed[k] = length / costs.step_time_ms(Candidate(k), length)
    found = run(Arithmetic({1: rate, 2: 0.0, 4: 0.0, 8: 0.0}, noise=0.03))
    assert found.winner is not None and found.winner.candidate.is_chain
    assert speed[found.winner.candidate.depth] > 0.97 * max(speed.values())
    assert found.winner.pays


def test_a_tree_that_is_worth_it_goes_to_sglang_and_a_chain_to_vllm() -> None:
    found = run(Arithmetic({1: 0.4, 2: 0.7, 4: 0.5, 8: 0.4}))
    chain, tree = found.best("chain"), found.best("tree")
    assert chain is not None and tree is not None and found.winner == tree and tree.candidate.top_k == 2
    chosen = recommend(found)
    assert chosen is not None and chosen.sglang is not None
    assert chosen.num_speculative_tokens == chain.candidate.depth
    assert (chosen.sglang.eagle_topk, chosen.sglang.num_draft_tokens) == (2, tree.candidate.total_token)


def test_no_prompt_is_both_searched_and_confirmed_on() -> None:
    bench = Arithmetic({1: 0.5, 2: 0.6, 4: 0.6, 8: 0.6})
    found = run(bench)
    searched = {q for phase, _, asked in bench.calls if phase == "search" for q in asked}
    confirmed = {q for phase, _, asked in bench.calls if phase.startswith("confirmation") for q in asked}
    assert searched and confirmed and not searched & confirmed
    assert found.prompts == {"search": sorted(searched, key=int), "confirmation": sorted(confirmed)}
    # each round has fewer candidates and more questions than the one before
    rounds = [(len(names), len(asked)) for phase, names, asked in bench.calls if phase == "search"]
    assert [n for n, _ in rounds] == sorted((n for n, _ in rounds), reverse=True) and rounds[0][1] <= rounds[-1][1]
    with pytest.raises(AssertionError, match="fresh prompts were searched on"):
        tune(bench, questions(4), questions(4, 3), Settings(600.0, 31))


@pytest.mark.parametrize("budget_s", [40.0, 120.0, 600.0])
def test_a_budget_is_kept(budget_s: float) -> None:
    bench = Arithmetic({1: 0.5, 2: 0.6, 4: 0.6, 8: 0.6})
    found = run(bench, budget_s)
    assert bench.now <= 1.1 * budget_s
    assert sum(found.spent_s.values()) == pytest.approx(bench.now)
    assert all(m.num_questions >= 2 for m in found.confirmed)
    assert set(found.spent_s) == {"costs", *PHASES}


def test_a_budget_too_small_says_the_least() -> None:
    with pytest.raises(UserError, match=r"a budget of 5 s is too small: .* give --budget-s \d+ or more") as caught:
        run(Arithmetic(EQUAL), 5.0)
    assert "\n" not in str(caught.value)
    least = float(str(caught.value).split("--budget-s ")[1].split()[0])
    assert run(Arithmetic(EQUAL), least).winner is not None


def test_a_cut_head_is_measured_where_it_is_predicted_to_be_faster() -> None:
    costs = _scaled(COSTS, 6.0)
    cheap = Arithmetic({1: 0.8, 2: 0.0, 4: 0.0, 8: 0.0}, costs=costs)
    cheap.cut_head = 0.3
    found = run(cheap)
    cut = found.best("cut")
    assert cut is not None and found.gain_of_cut is not None and found.gain_of_cut[0] > 1.1
    assert set(found.costs) == {"1024", "512", "256", "128"}
    assert "set families.f.vocab.draft_vocab_size: " in of_cut("f", found)
    # serving it takes another export, so it is told and not recommended
    assert found.winner is not None and found.winner.candidate.draft_vocab_size is None
    bad = Arithmetic({1: 0.8, 2: 0.0, 4: 0.0, 8: 0.0}, costs=costs)
    bad.cut_head, bad.cut_rate = 0.9, 0.5
    found = run(bad)
    assert found.best("cut") is None and found.gain_of_cut is None
    assert of_cut("f", found) == "Draft vocabulary: no cut is predicted to be faster."
    found.gain_of_cut, found.confirmed = (
        (1.05, (0.97, 1.2)),
        [replace(m, candidate=m.candidate.cut(512)) for m in found.confirmed],
    )
    assert of_cut("f", found).endswith("no gain is shown.")


def test_nothing_is_recommended_without_a_conclusion() -> None:
    """Draft and target cost the same to the point that noise decides."""
    found = run(Arithmetic({1: 0.105, 2: 0.0, 4: 0.0, 8: 0.0}, noise=0.2))
    assert found.winner is not None and found.winner.conclusion == "no conclusion"
    assert recommend(found) is None
    assert sentence(found).startswith("No conclusion: ") and "--budget-s" in sentence(found)


def test_what_is_printed_and_kept() -> None:
    bench = Arithmetic({1: 0.5, 2: 0.6, 4: 0.6, 8: 0.6})
    bench.cut_head = 0.5
    found = run(bench)
    options = CommandOptions(600.0, 31, 12, False, None)
    report = report_of("tiny", _family(), found, options, IDENTITY)
    assert len(report["predicted"]) == len(found.predictions) > 60
    assert all({"steps", "topk", "num_draft_tokens", "acceptance_length"} <= set(row) for row in report["predicted"])
    text = "\n".join(lines(report, found, options))
    assert "With --write this is written to families.tiny.serve.speculative: {" in text
    assert "need not" in text or "A server's costs differ" in text
    rows = points(found)
    assert rows[0]["steps"] == 0 and rows[0]["speed"] == pytest.approx(50.0)
    for row in rows:
        assert row["speed"] == pytest.approx(row["acc_length"] / row["step_time"], rel=0.05)


def _family() -> Any:
    from pathlib import Path

    from specflow.config import parse_params
    from tests.toys import tiny_params

    return parse_params(tiny_params(Path("/nowhere"))).families["tiny"]
