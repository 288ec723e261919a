"""What the parts of a step cost on this machine: a plain step, a verification of n tokens, a proposal of the draft.

Measured alone, on random tokens behind a context of a stated length, through the code that decoding runs. Nothing of it
comes from the benchmark's requests, so what it predicts of them can be checked against them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from specflow.config_bench import DynamicTree
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import clock_of
from specflow.decoding.sampling import GREEDY
from specflow.decoding.tree import TreeDrafter
from specflow.decoding.verify import Proposal, verify
from specflow.errors import UserError
from specflow.results.schema import DraftCosts, StepCosts
from specflow.targets.cached import CachedTarget

INGESTED = (1, 2, 4)
"""Rows that a proposal ingests: the accepted drafts of the last step and its own token."""
LEVELS = 4
"""Levels behind the first over which the time of one is averaged."""
MIN_PASSES, MAX_PASSES, WARM_UP_PASSES = 3, 50, 1

Pieces = dict[str, Callable[[], object]]


def measure_costs(
    target: CachedTarget,
    session: Eagle3Session,
    tokens: Sequence[int],
    context: int,
    *,
    top_ks: Sequence[int] = (),
    limit_s: float = 4.0,
    seed: int = 0,
) -> StepCosts:
    """Medians in milliseconds of passes over all pieces, whose order turns from one pass to the next; overwrites what
    `target` and `session` hold. At least MIN_PASSES, then as many as `limit_s` leaves.

    - `target_ms`: a plain step. `verify_ms`: a forward over n `tokens`, its logits and the verdict, by n.
    - `draft_ms`: `ingest_by_rows`, rows of verified tokens up to the first drafted token; `step_by_rows`, each further
      level, of 1 row in a chain and of top_k rows in a tree; `tree_by_rows`, what a tree's proposal takes beyond that
      whatever its depth. `ingest` and `step` are a chain's: 2 rows, then 1.
    - `context`: tokens before the step; fewer than asked for where the cache is shorter.
    """
    largest = max([*tokens, *INGESTED, LEVELS + 2])
    context = min(context, target.max_length - largest)
    if context < 1:
        raise UserError(f"{largest} tokens do not fit the context of {target.max_length}: lower bench.cost_tokens")
    bench = _Bench(target, session, context, seed)
    pieces: Pieces = {f"verify {n}": bench.verifying(n) for n in sorted({1, *tokens})}
    pieces |= {f"ingest {n}": bench.drafting(ChainDrafter(session), 1, n) for n in INGESTED}
    pieces["chain"] = bench.drafting(ChainDrafter(session), 1 + LEVELS, 1)
    for k in top_ks:
        if k > 1:
            for name, depth in ((f"tree {k}", 1), (f"tree {k} deep", 1 + LEVELS)):
                tree = DynamicTree(total_token=depth * k + 1, depth=depth, top_k=k)
                pieces[name] = bench.drafting(TreeDrafter(session, tree), depth, 1)
    times = _medians_ms(pieces, clock_of(target.device), limit_s)
    ingest = {n: times[f"ingest {n}"] for n in INGESTED}
    step = {1: max(0.0, times["chain"] - ingest[1]) / LEVELS}
    trees = {1: 0.0}
    for k in top_ks:
        if k > 1:
            step[k] = max(0.0, times[f"tree {k} deep"] - times[f"tree {k}"]) / LEVELS
            trees[k] = max(0.0, times[f"tree {k}"] - ingest[1])
    return StepCosts(
        target_ms=times["verify 1"],
        verify_ms={n: times[f"verify {n}"] for n in sorted({1, *tokens})},
        draft_ms=DraftCosts(
            ingest=ingest[2], step=step[1], ingest_by_rows=ingest, step_by_rows=step, tree_by_rows=trees
        ),
        context=context,
    )


class _Bench:
    """A sequence of random tokens in both caches, and the pieces of a step behind it."""

    def __init__(self, target: CachedTarget, session: Eagle3Session, context: int, seed: int) -> None:
        self.target, self.session, self.context = target, session, context
        generator = torch.Generator().manual_seed(seed)
        size = target.model.get_input_embeddings().weight.shape[0]
        self.tokens: list[int] = torch.randint(size, (target.max_length + 1,), generator=generator).tolist()
        target.lengths[0] = 0
        target.forward(torch.tensor([self.tokens[:context]]))
        self.aux = target.aux()[0]

    def verifying(self, num_tokens: int) -> Callable[[], object]:
        drafted = self.tokens[self.context + 1 : self.context + num_tokens]

        def run() -> None:
            self.target.lengths[0] = self.context
            hidden = self.target.forward(torch.tensor([[self.tokens[self.context], *drafted]]))
            verdict = verify(Proposal(drafted), self.target.logits(hidden[0]), GREEDY, None)
            self.target.keep(verdict.path)

        return run

    def drafting(self, drafter: ChainDrafter | TreeDrafter, depth: int, num_ingested: int) -> Callable[[], object]:
        """A proposal after ingesting rows; there are at most `context` of them."""
        rows = min(num_ingested, self.context)
        history = self.tokens[: self.context + 1]

        def run() -> None:
            if self.session.verified < self.context - rows:  # a drafter may have made room, which forgets
                self.session.start(history, self.aux)
            self.session.verified = self.context - rows
            drafter.propose(history, self.aux[-rows:], depth, GREEDY, None)

        return run


def _medians_ms(pieces: Pieces, clock: Callable[[], float], limit_s: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in pieces}
    began = clock()
    for number in range(WARM_UP_PASSES + MAX_PASSES):
        if number >= WARM_UP_PASSES + MIN_PASSES and clock() - began > limit_s:
            break
        for name in list(pieces)[:: -1 if number % 2 else 1]:
            start = clock()
            pieces[name]()
            if number >= WARM_UP_PASSES:
                times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
