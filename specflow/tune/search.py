"""The search: costs and acceptance first, measurements of what they leave over, then a confirmation on fresh prompts.

Knows neither model nor clock: a `Workbench` has them, and a test gives one whose clock is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from specflow.bench.statistics import metrics
from specflow.bench.statistics.intervals import speedup_interval
from specflow.bench.statistics.records import Record, paired
from specflow.data.prompt_sets import Question
from specflow.errors import UserError
from specflow.results.schema import Conditions, StepCosts
from specflow.tune.acceptance import Walkable, acceptance_length
from specflow.tune.candidates import Candidate, CostModel, Prediction, grid, predict, prune
from specflow.tune.findings import Found, Measured, judged, kind_of, summarise

DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8)
TOP_KS = (1, 2, 4, 8)
TOTALS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
CUTS = (2, 4, 8)
"""The draft's vocabulary is tried at 1/2, 1/4 and 1/8."""
LEAST_CUT = 64
PHASES = {"acceptance": 0.3, "cuts": 0.4, "search": 0.65, "confirmation": 1.0}
"""Shares of the budget after which each phase ends."""
COSTS_S, COSTS_SHARE = 4.0, 0.03
"""Seconds for one table of costs: at most, and as a share of the budget."""
KEEP = 6
"""Candidates that are measured at first."""
CHUNK = 2
"""Questions measured at a time: from one to the next the order of the engines is reversed."""
BEFORE_HALVING = 4
"""Questions that every candidate answers before the first goes."""
MOST_REPEATS = 3
"""Passes over the fresh prompts while the budget lasts."""


class Workbench(Protocol):
    """What the search asks of model and machine."""

    draft_vocab_size: int
    max_new_tokens: int
    greedy: bool
    conditions: Conditions
    """What of the machine counts against a conclusion, as `bench.verdict` takes it."""

    def clock(self) -> float:
        """Seconds."""

    def costs(self, draft_vocab_size: int | None, limit_s: float) -> StepCosts:
        """`bench.costs.measure_costs` of the draft, its head cut down to so many tokens."""

    def answer(
        self, question: Question, depths: Mapping[int, int], draft_vocab_size: int | None
    ) -> dict[int, Walkable]:
        """The target's answer with the ranks of its tokens, for each top_k (-> how deep its trees are grown)."""

    def measure(self, candidates: Sequence[Candidate], questions: Sequence[Question], phase: str) -> list[Record]:
        """Records of the target alone (`baseline`) and of each candidate by name, paired, in alternating order."""

    def can_cut(self) -> bool:
        """Whether it is known which tokens are frequent."""


@dataclass(frozen=True)
class Settings:
    budget_s: float
    max_nodes: int
    keep: int = KEEP


def widths(draft_vocab_size: int) -> list[int]:
    """The top_k that a draft of so many tokens can have."""
    return [top_k for top_k in TOP_KS if top_k <= draft_vocab_size]


def tune(bench: Workbench, searched: Sequence[Question], fresh: Sequence[Question], settings: Settings) -> Found:
    """Search on the questions `searched`, confirm on `fresh`, within `settings.budget_s` from now.

    Raises UserError, naming the least that would do, where the budget is too small for one round of each phase.
    """
    assert not {q.question_id for q in searched} & {q.question_id for q in fresh}, "fresh prompts were searched on"
    watch = _Watch(bench, settings.budget_s)
    found = Found()
    candidates = grid(DEPTHS, widths(bench.draft_vocab_size), TOTALS, settings.max_nodes)
    costs = _costs(bench, found, None, settings.budget_s)
    watch.lap("costs", found)
    _check_budget(settings.budget_s, watch.spent, costs, bench, candidates)
    answered = _predict(bench, found, candidates, None, searched, watch.until("acceptance"))
    watch.lap("acceptance", found)
    if bench.can_cut():
        for divisor in CUTS:
            size = bench.draft_vocab_size // divisor
            if size >= LEAST_CUT and watch.left("cuts") > found.spent_s["costs"]:
                _costs(bench, found, size, settings.budget_s)
                _predict_cut(bench, found, size, searched[: len(answered)], watch.until("cuts"))
    watch.lap("cuts", found)
    found.predictions.sort(key=lambda p: (-p.speedup, p.candidate))
    rivals = _rivals(found.predictions, settings.keep)
    asked, finalists = _search(bench, found, rivals, searched, watch.until("search"))
    watch.lap("search", found)
    confirming = _confirm(bench, found, finalists, fresh, watch.until("confirmation"))
    watch.lap("confirmation", found)
    found.prompts = {"search": [q.question_id for q in asked], "confirmation": confirming}
    return found


class _Watch:
    """What of the budget is spent, and when the phases have to end."""

    def __init__(self, bench: Workbench, budget_s: float) -> None:
        self._clock, self._budget, self._start = bench.clock, budget_s, bench.clock()
        self._lap = self._start

    @property
    def spent(self) -> float:
        return self._clock() - self._start

    def left(self, phase: str) -> float:
        return PHASES[phase] * self._budget - self.spent

    def until(self, phase: str) -> _Deadline:
        return _Deadline(self._clock, self._start + PHASES[phase] * self._budget)

    def lap(self, phase: str, found: Found) -> None:
        now = self._clock()
        found.spent_s[phase], self._lap = now - self._lap, now


class _Deadline:
    """Whether work of a size still fits, by how long work of its kind took; the first piece always does."""

    def __init__(self, clock: Callable[[], float], at: float) -> None:
        self._clock, self._at = clock, at
        self._before = clock()
        self._slowest_s: float | None = None

    def fits(self, pieces: int) -> bool:
        return self._slowest_s is None or self._clock() + pieces * self._slowest_s <= self._at

    def did(self, pieces: int) -> None:
        """So many pieces were done since the last call."""
        now = self._clock()
        self._slowest_s = max(self._slowest_s or 0.0, (now - self._before) / pieces)
        self._before = now


def _costs(bench: Workbench, found: Found, size: int | None, budget_s: float) -> CostModel:
    measured = bench.costs(size, min(COSTS_S, COSTS_SHARE * budget_s))
    found.costs[str(size or bench.draft_vocab_size)] = measured
    return CostModel.of(measured)


def least_budget_s(spent_s: float, costs: CostModel, max_new_tokens: int, candidates: Sequence[Candidate]) -> float:
    """Seconds that one round of each phase takes at least, after `spent_s` for the costs.

    One answer with all trees; then a chunk each of search and confirmation, by the target and two candidates that are
    assumed to be no faster.
    """
    answer_s = 1e-3 * max_new_tokens * costs.target_ms
    trees_s = 1e-3 * max_new_tokens * sum(costs.draft_ms(c, 1.0) for c in _deepest(candidates).values())
    phases = [spent_s + answer_s + trees_s, 3 * CHUNK * answer_s, 3 * CHUNK * answer_s]
    # each phase ends at its share of the whole, so the whole is what the tightest one asks for
    shares = [PHASES["acceptance"], PHASES["search"] - PHASES["cuts"], 1.0 - PHASES["search"]]
    return max(need / share for need, share in zip(phases, shares, strict=True))


def _check_budget(
    budget_s: float, spent_s: float, costs: CostModel, bench: Workbench, candidates: Sequence[Candidate]
) -> None:
    least = least_budget_s(spent_s, costs, bench.max_new_tokens, candidates)
    if budget_s < least:
        raise UserError(
            f"a budget of {budget_s:g} s is too small: a plain step takes {costs.target_ms:.1f} ms and answers have "
            f"{bench.max_new_tokens} tokens, so one round takes {math.ceil(least)} s; give --budget-s "
            f"{math.ceil(least)} or more"
        )


def _deepest(candidates: Iterable[Candidate]) -> dict[int, Candidate]:
    """By top_k the deepest candidate."""
    deepest: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate.top_k not in deepest or candidate.depth > deepest[candidate.top_k].depth:
            deepest[candidate.top_k] = candidate
    return deepest


def _predict(
    bench: Workbench,
    found: Found,
    candidates: Sequence[Candidate],
    size: int | None,
    questions: Sequence[Question],
    deadline: _Deadline,
) -> list[Question]:
    """Add a prediction of each candidate; return the questions whose answers they rest on."""
    depths = {top_k: candidate.depth for top_k, candidate in _deepest(candidates).items()}
    answers: dict[int, list[Walkable]] = {top_k: [] for top_k in depths}
    answered = []
    for question in questions:
        if not deadline.fits(1):
            break
        for top_k, walkable in bench.answer(question, depths, size).items():
            answers[top_k].append(walkable)
        answered.append(question)
        deadline.did(1)
    costs = CostModel.of(found.costs[str(size or bench.draft_vocab_size)])
    for candidate in candidates:
        length = acceptance_length(answers[candidate.top_k], candidate)
        found.predictions.append(predict(candidate.cut(size), length, costs))
    return answered


def _predict_cut(bench: Workbench, found: Found, size: int, questions: Sequence[Question], deadline: _Deadline) -> None:
    """Predictions with a cut head, of the shapes that are best with the whole one."""
    whole = [p for p in found.predictions if p.candidate.draft_vocab_size is None]
    shapes = [p.candidate for p in prune(whole, keep=4)]
    _predict(bench, found, shapes, size, questions, deadline)


def _rivals(predictions: Sequence[Prediction], keep: int) -> list[Candidate]:
    """What is measured: the best with the whole vocabulary, and the best cut head if it is predicted to be faster."""
    whole = prune([p for p in predictions if p.candidate.draft_vocab_size is None], keep)
    cut = max(
        (p for p in predictions if p.candidate.draft_vocab_size is not None), key=lambda p: p.speedup, default=None
    )
    chosen = [p.candidate for p in whole]
    if cut is not None and whole and cut.speedup > whole[0].speedup:
        chosen.append(cut.candidate)
    return chosen


def _search(
    bench: Workbench, found: Found, rivals: Sequence[Candidate], questions: Sequence[Question], deadline: _Deadline
) -> tuple[list[Question], list[Candidate]]:
    """Successive halving: in every round the slower half goes, but for the fastest of each kind.

    Each round asks twice as many questions as the one before, and all that are left have answered all of them. Returns
    the questions that were asked, and the fastest of each kind.
    """
    alive, size = list(rivals), CHUNK
    records: list[Record] = []
    asked: list[Question] = []
    measured: dict[str, Measured] = {}
    while not asked or (len(asked) < len(questions) and len({kind_of(c) for c in alive}) < len(alive)):
        chunk = questions[len(asked) : len(asked) + size]
        while len(chunk) > CHUNK and not deadline.fits(len(chunk) * (len(alive) + 1)):
            chunk = chunk[: max(CHUNK, len(chunk) // 2)]
        if not deadline.fits(len(chunk) * (len(alive) + 1)):
            break
        records += bench.measure(alive, chunk, "search")
        deadline.did(len(chunk) * (len(alive) + 1))
        asked += chunk
        size *= 2
        ranked = [summarise(records, candidate) for candidate in alive]
        ranked.sort(key=lambda m: -m.speedup)
        measured |= {m.candidate.name: m for m in ranked}
        alive = _faster_half(ranked) if len(asked) >= BEFORE_HALVING else [m.candidate for m in ranked]
    # those that went out early are listed behind those that stayed, whatever they showed on fewer questions
    found.searched = sorted(measured.values(), key=lambda m: (-m.num_questions, -m.speedup))
    first: dict[str, Candidate] = {}
    for candidate in alive:  # fastest first
        first.setdefault(kind_of(candidate), candidate)
    return asked, list(first.values())


def _faster_half(ranked: Sequence[Measured]) -> list[Candidate]:
    """The faster half, and the fastest of each kind; fastest first."""
    kept, kinds = [], set[str]()
    for place, m in enumerate(ranked):
        if place < (len(ranked) + 1) // 2 or kind_of(m.candidate) not in kinds:
            kept.append(m.candidate)
        kinds.add(kind_of(m.candidate))
    return kept


def _confirm(
    bench: Workbench,
    found: Found,
    finalists: Sequence[Candidate],
    questions: Sequence[Question],
    deadline: _Deadline,
) -> list[str]:
    """Measure the finalists on fresh questions, each once before any a second time; return the questions' ids."""
    records: list[Record] = []
    for chunk, repeat in _chunks(questions):
        cost = len(chunk) * (len(finalists) + 1)
        if not deadline.fits(cost):
            break
        # odd repeats start with the other engine: the chunk is asked back to front
        ordered = chunk if repeat % 2 == 0 else chunk[::-1]
        done = bench.measure(finalists, ordered, f"confirmation-{repeat}")
        records += [replace(record, set="confirmation", repeat=repeat) for record in done]
        deadline.did(cost)
    found.confirmed = [
        judged(records, candidate, greedy=bench.greedy, conditions=bench.conditions) for candidate in finalists
    ]
    cut, winner = found.best("cut"), found.winner
    if cut is not None and winner is not None:
        own = {m.candidate.name: [r for r in records if r.engine == m.candidate.name] for m in (cut, winner)}
        pairs = paired(own[winner.candidate.name], own[cut.candidate.name])
        gain = metrics.speedup(pairs)
        assert gain is not None, "both answered the same questions"
        found.gain_of_cut = gain, speedup_interval(pairs)
    return sorted({record.question_id for record in records})


def _chunks(questions: Sequence[Question]) -> Iterator[tuple[Sequence[Question], int]]:
    for repeat in range(MOST_REPEATS):
        for start in range(0, len(questions), CHUNK):
            yield questions[start : start + CHUNK], repeat
