"""Packing: whole documents end to end into micro-batches, and the row bookkeeping of training-time test.

No split documents, and no padding but a few rows of filler behind the last one. Only rows where a chain of supervised
tokens starts are queries; the other rows of a document (prompts, later user turns) cost a feature and a key, never an
MLP, a head or a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specflow.drafters.attention import Prefix, Segment
from specflow.drafters.eagle3 import PackedRows

ROUND_ROWS = 32
"""Training packs to multiples of as many rows: a product of a new shape costs oneDNN a millisecond, which is more."""


@dataclass(frozen=True)
class Document:
    """One captured row: token_ids [T] int64, aux [T, A * H], final [T, H] post-norm states, spans of supervised
    tokens.
    """

    id: str
    token_ids: Tensor
    aux: Tensor
    final: Tensor
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    ids: list[str]
    """Ids of the documents, for messages."""
    num_tokens: int
    """Of the documents; `rows` may hold filler behind them."""
    rows: PackedRows
    supervised: list[Tensor]
    """[S] of [R_k] int64: query numbers supervised at step k, ascending."""
    teacher_rows: list[Tensor]
    """[S] of [R_k] int64: the teacher position each of them predicts."""
    teacher_states: Tensor
    """[P, H] state that predicts each supervised token."""
    labels: Tensor
    """[P] int64: the supervised tokens themselves (target ids)."""
    served: Tensor
    """[M] bool: queries where a server starts chains. An answer's first token comes from the prompt's own forward, so
    that the row that predicts it is trained on, but starts none; nor does filler.
    """

    def to(self, device: torch.device | str) -> Batch:
        def move(x: Tensor) -> Tensor:
            return x.to(device)

        r = self.rows
        rows = PackedRows(move(r.tokens), move(r.aux), move(r.positions), move(r.queries), r.prefix)
        return Batch(
            self.ids,
            self.num_tokens,
            rows,
            [move(x) for x in self.supervised],
            [move(x) for x in self.teacher_rows],
            move(self.teacher_states),
            move(self.labels),
            move(self.served),
        )


def plan_batches(lengths: list[int], batch_tokens: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle documents by (seed, epoch) and pack them, first fit, into batches of at most `batch_tokens`.

    A function of its arguments alone, so a resumed run sees the same data in the same order. A document longer than
    `batch_tokens` makes a batch of its own.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    open_batches: list[tuple[list[int], int]] = []
    done: list[list[int]] = []
    for index in order:
        length = lengths[index]
        for place, (members, room) in enumerate(open_batches):
            if length <= room:
                members.append(index)
                open_batches[place] = (members, room - length)
                break
        else:
            open_batches.append(([index], batch_tokens - length))
        if len(open_batches) > 8:  # keep few open: order stays random, the search short
            fullest = min(range(len(open_batches)), key=lambda place: open_batches[place][1])
            done.append(open_batches.pop(fullest)[0])
    return done + [members for members, _ in open_batches]


def count_supervised(length: int, spans: list[tuple[int, int]], ttt_steps: int) -> list[int]:
    """Rows of one document that are supervised at each step.

    A chain starts at a row t whose token t + 2 is supervised; at step k it predicts token t + 2 + k, in the same span.
    """
    return [sum(max(0, min(end, length) - max(start, 2) - k) for start, end in spans) for k in range(ttt_steps)]


def pack(documents: list[Document], ttt_steps: int, round_to: int = 1) -> Batch:
    """Lay documents end to end. aux and states keep their dtype; all index tensors are int64 on CPU.

    Rows and queries are filled up to multiples of `round_to` by a document of zeros, all at position 0, that nothing
    supervises.
    """
    offset, query_count, teacher_count = 0, 0, 0
    tokens, positions, queries, segments, states, labels, served = [], [], [], [], [], [], []
    supervised: list[list[Tensor]] = [[] for _ in range(ttt_steps)]
    teacher_rows: list[list[Tensor]] = [[] for _ in range(ttt_steps)]
    for document in documents:
        ids = document.token_ids
        length = len(ids)
        ahead = torch.arange(length)[None] + torch.arange(1, ttt_steps + 1)[:, None]
        tokens.append(ids[ahead.clamp(max=length - 1)])  # past the end: any token, such rows are not supervised
        positions.append(torch.arange(length))
        runs = _query_runs(document.spans)
        number = torch.full((length,), -1)  # packed row of this document -> query number
        for start, stop in runs:
            segments.append(Segment(query_count, query_count + stop - start, offset, offset + start))
            number[start:stop] = torch.arange(query_count, query_count + stop - start)
            queries.append(torch.arange(offset + start, offset + stop))
            query_count += stop - start
        for start, end in document.spans:
            # token p is predicted by the state at p - 1, and at step k by row p - 2 - k
            states.append(document.final[max(start, 1) - 1 : end - 1])
            labels.append(ids[max(start, 1) : end])
            served.append(number[max(start - 1, 0) : max(end - 2, 0)])
            for k in range(ttt_steps):
                predicted = torch.arange(min(max(start, 2) + k, end), end)
                supervised[k].append(number[predicted - 2 - k])
                teacher_rows[k].append(predicted - max(start, 1) + teacher_count)
            teacher_count += end - max(start, 1)
        offset += length
    num_idle = -query_count % round_to
    num_filler = num_idle + -(offset + num_idle) % round_to
    if num_idle:
        segments.append(Segment(query_count, query_count + num_idle, offset, offset))
        queries.append(torch.arange(offset, offset + num_idle))
    tokens.append(torch.zeros(ttt_steps, num_filler, dtype=torch.int64))
    positions.append(torch.zeros(num_filler, dtype=torch.int64))
    aux = [document.aux for document in documents]
    rows = PackedRows(
        tokens=torch.cat(tokens, dim=1),
        aux=torch.cat([*aux, aux[0].new_zeros(num_filler, aux[0].shape[1])]),
        positions=torch.cat(positions),
        queries=torch.cat(queries),
        prefix=Prefix(segments),
    )
    return Batch(
        [document.id for document in documents],
        offset,
        rows,
        [torch.cat(x) for x in supervised],
        [torch.cat(x) for x in teacher_rows],
        torch.cat(states),
        torch.cat(labels),
        torch.zeros(len(rows.queries), dtype=torch.bool).index_fill_(0, torch.cat(served), True),
    )


def _query_runs(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs [start, stop) of rows where chains start: span [a, b) has rows a-2 .. b-3; touching runs join."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        first, last = max(0, start - 2), end - 2
        if last <= first:
            continue
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return runs
