"""Generation of several sequences side by side, with or without a chain draft: `generate.py`'s loop over rows.

Each row accepts as much of its own proposal as it can, so rows grow at different speeds over ragged caches. A row that
has ended leaves, and a waiting prompt takes its place. What a row says does not depend on its neighbours, but for the
rounding of wider matrix products.

Accounting is that of `generate.py`, row by row. The time of a shared forward is divided among its rows, so that sums
over rows are wall time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specflow.decoding.generate import Generation, check_fits, clock_of, emit
from specflow.decoding.sampling import GREEDY, Dense, Few, Sampling
from specflow.decoding.verify import NOTHING, Proposal, Verdict, descend, verify
from specflow.drafters.eagle3 import Eagle3Draft, RaggedDraftCache
from specflow.drafters.inference import prepare
from specflow.model_time import MODEL_TIME
from specflow.targets.cached import CachedTarget


class BatchChainDrafter:
    """An EAGLE-3 chain for several sequences at once; row i of its cache belongs to row i of the target's.

    Takes the draft over, as `Eagle3Session` does. `embedding` [V, H] is the target's input table.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, num_rows: int, max_length: int) -> None:
        self.draft, self.embedding = prepare(draft), embedding
        self._device, self._dtype = draft.norm.weight.device, draft.norm.weight.dtype
        self._target_ids = draft.d2t + torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device)
        self._cache = RaggedDraftCache(draft.config, num_rows, max_length, self._dtype, self._device)

    @torch.inference_mode()
    def start(self, row: int, history: Sequence[int], aux: Tensor) -> None:
        """Begin a sequence in `row`: `history` [n + 1] tokens, of which the first n have aux rows [n, A * H]."""
        self._cache.lengths[row] = 0
        if len(aux) > 1:
            self._ingest(row, [history[1:-1]], [aux[:-1]])

    @torch.inference_mode()
    def propose(
        self,
        histories: Sequence[Sequence[int]],
        aux: Sequence[Tensor],
        num_tokens: int,
        sampling: Sampling,
        generators: Sequence[torch.Generator | None],
    ) -> list[Proposal]:
        """Draft `num_tokens` after each of the first rows; `aux[i]` [n_i, A * H] as for one sequence."""
        b = len(histories)
        hidden = self._ingest(0, [history[-len(rows) :] for history, rows in zip(histories, aux, strict=True)], aux)
        verified = self._cache.lengths[:b].clone()
        tokens: list[Tensor] = []
        draws: list[list[Dense | Few]] = [[] for _ in histories]
        for k in range(num_tokens):
            with MODEL_TIME.call(self._device):
                if k > 0:
                    embeddings = self._embed(tokens[-1])
                    hidden = self.draft.decode_rows(embeddings[:, None], hidden[:, None], self._cache)[:, 0]
                logits = self.draft.logits(hidden)
            if sampling.greedy:
                tokens.append(self._target_ids[logits.argmax(-1)])
            else:
                # one draw per row from the row's own generator: what it draws is what it would draw alone
                drawn = [sampling.draft(row, self._target_ids, g) for row, g in zip(logits, generators, strict=True)]
                tokens.append(torch.cat([token for token, _ in drawn]))
                for own, (_, drawn_from) in zip(draws, drawn, strict=True):
                    own.append(drawn_from)
        self._cache.lengths[:b] = verified  # forget the speculative rows
        chains = torch.stack(tokens, dim=1).tolist()
        return [Proposal(chain, draws=own) for chain, own in zip(chains, draws, strict=True)]

    def move_row(self, source: int, into: int) -> None:
        self._cache.move_row(source, into)

    def _ingest(self, first: int, following: Sequence[Sequence[int]], aux: Sequence[Tensor]) -> Tensor:
        """Feed rows of verified positions to the sequences from `first` on, of a length each: the tokens after them
        and their aux states. Returns each sequence's last recycled state [b, H].
        """
        counts = torch.tensor([len(rows) for rows in aux])
        b, n = len(aux), int(counts.max())
        ids = torch.zeros(b, n, dtype=torch.int64)
        states = aux[0].new_zeros(b, n, aux[0].shape[-1])
        for i, (tokens, rows) in enumerate(zip(following, aux, strict=True)):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            states[i, : len(rows)] = rows
        states, ids = states.to(self._device, self._dtype), ids.to(self.embedding.device)
        with MODEL_TIME.call(self._device):
            features = self.draft.project(states.flatten(0, 1)).view(b, n, -1)
            hidden = self.draft.decode_rows(self._embed(ids), features, self._cache, first)
        self._cache.lengths[first : first + b] -= n - counts
        return hidden[torch.arange(b), counts - 1]

    def _embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding).to(self._device, self._dtype)


@dataclass
class _Row:
    """A sequence under way in the cache row of its place in the list."""

    number: int
    """Of its prompt."""
    history: list[int]
    done: Generation
    aux: Tensor | None
    """States of the positions verified last, for the drafter."""


@torch.inference_mode()
def generate_batch(
    target: CachedTarget,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    drafter: BatchChainDrafter | None = None,
    num_speculative_tokens: int = 0,
    sampling: Sampling = GREEDY,
    generators: Sequence[torch.Generator | None] | None = None,
) -> list[Generation]:
    """Continue each prompt until an end-of-turn token or `max_new_tokens`, `target.num_rows` of them at a time.

    `generators`: one per prompt, on the target's device. Raises UserError where a prompt does not fit the cache.
    """
    for prompt in prompts:
        check_fits(len(prompt), max_new_tokens, num_speculative_tokens, target.max_length)
    batch = _Batch(target, drafter, num_speculative_tokens, sampling, eos_ids, max_new_tokens)
    return batch.run(prompts, [None] * len(prompts) if generators is None else generators)


class _Batch:
    def __init__(
        self,
        target: CachedTarget,
        drafter: BatchChainDrafter | None,
        num_speculative_tokens: int,
        sampling: Sampling,
        eos_ids: Collection[int],
        max_new_tokens: int,
    ) -> None:
        self.target, self.drafter, self.k, self.sampling = target, drafter, num_speculative_tokens, sampling
        self.eos_ids, self.max_new_tokens = eos_ids, max_new_tokens
        self.clock = clock_of(target.device)
        self.rows: list[_Row] = []  # row i of the caches: the rows in use are always the first ones

    def run(self, prompts: Sequence[Sequence[int]], generators: Sequence[torch.Generator | None]) -> list[Generation]:
        self.prompts, self.generators = prompts, generators
        done: list[Generation] = [Generation([]) for _ in prompts]
        waiting = deque(range(len(prompts)))
        while self.rows or waiting:
            while waiting and len(self.rows) < self.target.num_rows:
                number = waiting.popleft()
                self._admit(number, done[number])
            if self.rows:
                self._step()
        return done

    def _admit(self, number: int, done: Generation) -> None:
        """Compute a prompt in the first free row, and its first token."""
        began, place, prompt = self.clock(), len(self.rows), self.prompts[number]
        self.target.lengths[place] = 0
        hidden = self.target.forward(torch.tensor([list(prompt)]), rows=[place])
        first = verify(NOTHING, self.target.logits(hidden[0, -1:]), self.sampling, self.generators[number]).next_token
        row = _Row(number, [*prompt, first], done, None)
        if not self._emit(row, [first]):
            if self.drafter is not None:
                aux = self.target.aux()[0]
                self.drafter.start(place, row.history, aux)
                row.aux = aux[-1:]
            self.rows.append(row)
        done.prefill_s = self.clock() - began

    def _step(self) -> None:
        """One verification of all rows."""
        inside, began, rows = MODEL_TIME.seconds(), self.clock(), list(self.rows)
        proposals = self._propose()
        drafted_at = self.clock()
        tokens = [[row.history[-1], *proposal.token_ids] for row, proposal in zip(rows, proposals, strict=True)]
        logits = self.target.logits(self.target.forward(torch.tensor(tokens)))
        verdicts = self._verify(proposals, logits)
        aux = self.target.aux() if self.drafter is not None else None
        ended = []
        for place, (row, proposal, verdict) in enumerate(zip(rows, proposals, verdicts, strict=True)):
            self.target.lengths[place] = len(row.history) + verdict.accepted  # forget the rejected drafts
            row.aux = None if aux is None else aux[place, : verdict.accepted + 1]
            emitted = [*proposal.token_ids[: verdict.accepted], verdict.next_token]
            row.history.extend(emitted)
            row.done.steps.append((len(proposal.token_ids), verdict.accepted))
            if self._emit(row, emitted):
                ended.append(place)
        for place in reversed(ended):
            self._release(place)
        share, at = 1.0 / len(rows), self.clock()
        inside = MODEL_TIME.seconds() - inside
        for row in rows:
            row.done.draft_s += (drafted_at - began) * share
            row.done.verify_s += (at - drafted_at) * share
            row.done.decode_s += (at - began) * share
            row.done.model_s += inside * share

    def _propose(self) -> list[Proposal]:
        if self.drafter is None:
            return [NOTHING] * len(self.rows)
        aux = [row.aux for row in self.rows if row.aux is not None]
        generators = [self.generators[row.number] for row in self.rows]
        return self.drafter.propose([row.history for row in self.rows], aux, self.k, self.sampling, generators)

    def _verify(self, proposals: Sequence[Proposal], logits: Tensor) -> list[Verdict]:
        """Verdicts of logits [b, K + 1, V], each row with its own generator."""
        if self.sampling.greedy:  # the host waits for the device once
            choices = logits.argmax(-1).tolist()
            return [descend(p, row.__getitem__) for p, row in zip(proposals, choices, strict=True)]
        return [
            verify(proposal, logits[place], self.sampling, self.generators[row.number])
            for place, (row, proposal) in enumerate(zip(self.rows, proposals, strict=True))
        ]

    def _emit(self, row: _Row, tokens: list[int]) -> bool:
        limit = len(self.prompts[row.number]) + self.max_new_tokens
        return emit(row.done, row.history, tokens, self.eos_ids, limit)

    def _release(self, place: int) -> None:
        """Close the gap that an ended row leaves."""
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
            self.target.move_row(len(self.rows), place)
            if self.drafter is not None:
                self.drafter.move_row(len(self.rows), place)
