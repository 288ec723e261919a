"""Tree drafting with an EAGLE-3 draft: several continuations at once, of which the target follows at most one.

A static tree has the same branches at every step. A dynamic tree is EAGLE-2's (arXiv 2406.16858, section 4): each level
expands the `top_k` nodes whose paths the draft finds likeliest, then the likeliest of all nodes are kept. Either is
grown on the device, level by level, without the host waiting; tokens and shape come back in one transfer.

Legend: b rows of a level, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from specflow.config_bench import DynamicTree, StaticTree
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.sampling import Sampling
from specflow.decoding.verify import Proposal
from specflow.errors import UserError


class _Growing(Protocol):
    num_rows: int
    """Rows of the draft's cache beyond those of verified positions."""

    def grow(self, session: Eagle3Session, hidden: Tensor, temperature: float) -> Proposal: ...


class TreeDrafter:
    """Drafts `tree`; its tokens are certainties also where the target samples. Raises UserError for a tree that is
    wider than the draft's vocabulary.
    """

    def __init__(self, session: Eagle3Session, tree: DynamicTree | StaticTree) -> None:
        self.session, self.tree = session, tree
        check_width(tree, session.draft.config.draft_vocab_size)
        self._growing: _Growing = _Dynamic(tree, session) if isinstance(tree, DynamicTree) else _Static(tree, session)
        session.reserve(self._growing.num_rows)

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self.session.start(history, aux)

    def max_nodes(self, num_tokens: int) -> int:
        return self.tree.total_token - 1

    @torch.inference_mode()
    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Draft the tree after `history`; `num_tokens` is its depth. The host waits for the device once, at the end.

        `aux` [n, A * H] are the rows of the n positions verified since the last call: those before the last token.
        """
        assert num_tokens == self.tree.depth, "a tree has its own depth"
        hidden = self.session.ingest(history, aux)[-1:]
        return self._growing.grow(self.session, hidden, 1.0 if sampling.greedy else sampling.temperature)

    @torch.inference_mode()
    def candidates(
        self, history: Sequence[int], aux: Tensor | None, sampling: Sampling
    ) -> tuple[list[int], list[int], list[float]]:
        """Token, parent and log probability of the path, of all that a dynamic tree keeps the likeliest of; `aux` as in
        `propose`.
        """
        assert isinstance(self._growing, _Dynamic), "a static tree keeps what it drafts"
        hidden = self.session.ingest(history, aux)[-1:]
        found = self._growing.expand(self.session, hidden, 1.0 if sampling.greedy else sampling.temperature)
        tokens, parents, scores = (part.tolist() for part in found)
        return tokens, parents, scores


def check_width(tree: DynamicTree | StaticTree, draft_vocab_size: int) -> None:
    """Raise UserError for a tree that is wider than the draft's vocabulary."""
    width = tree.top_k if isinstance(tree, DynamicTree) else 1 + max(max(path) for path in tree.branches)
    if width > draft_vocab_size:
        raise UserError(
            f"tree takes the {width} likeliest tokens of a draft that knows {draft_vocab_size}: make it narrower"
        )


class _Dynamic:
    def __init__(self, tree: DynamicTree, session: Eagle3Session) -> None:
        self.tree = tree
        self.num_rows = tree.top_k * (tree.depth - 1)
        self._itself = _mask_of(torch.eye(tree.top_k, dtype=torch.bool), session)

    def grow(self, session: Eagle3Session, hidden: Tensor, temperature: float) -> Proposal:
        """`hidden` [1, H]: recycled state of the last verified row."""
        return self._best(*self.expand(session, hidden, temperature))

    def expand(self, session: Eagle3Session, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, parents and scores [candidates] of all levels; a score is the log probability of a node's path."""
        k = self.tree.top_k
        choices: list[Tensor] = []  # draft ids of every candidate so far, [rows, k] of each level
        scores: list[Tensor] = []
        rows = [torch.full((1,), -1, device=hidden.device)]  # candidate that each row of a level is
        reached = hidden.new_zeros(1, dtype=torch.float32)  # log probability of the path to each row of the level
        mask = hidden.new_zeros(1, session.verified)  # what each row of the level sees
        num_candidates = 0
        for level in range(1, self.tree.depth + 1):
            best = (session.logits(hidden).float() / temperature).log_softmax(-1).topk(k)
            choices.append(best.indices)
            scores.append((reached[:, None] + best.values.clamp_(max=0.0)).flatten())  # no child above its parent
            if level == self.tree.depth:
                break
            ordered = scores[-1].sort(descending=True, stable=True)  # the first among equals
            reached, chosen = ordered.values[:k], ordered.indices[:k]
            source = chosen // k
            rows.append(chosen + num_candidates)
            num_candidates += len(scores[-1])
            mask = torch.cat((mask[source], self._itself), dim=1)
            tokens = session.target_ids[choices[-1].flatten()[chosen]]
            hidden = session.step(tokens, hidden[source], session.verified + level - 1, mask if k > 1 else None)
        tokens = session.target_ids[torch.cat(choices).flatten()]
        return tokens, torch.cat(rows).repeat_interleave(k), torch.cat(scores)

    def _best(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Proposal:
        """The likeliest candidates, in their order. A parent is never less likely than its child and comes first among
        equals, so it is never left out.
        """
        # one transfer, in a type that holds all three exactly
        ids, hangs_on, values = torch.stack((tokens.double(), parents.double(), scores.double())).tolist()
        kept = sorted(sorted(range(len(ids)), key=lambda node: -values[node])[: self.tree.total_token - 1])
        places = {-1: -1} | {node: place for place, node in enumerate(kept)}
        return Proposal([int(ids[node]) for node in kept], [places[int(hangs_on[node])] for node in kept])


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth: which row of the level before drafts each, and which of them draft in turn."""

    width: int
    """Most tokens that a row drafts."""
    source: Tensor
    """[n] row that drafts the node."""
    rank: Tensor
    """[n] at which rank."""
    rows: Tensor
    """[b] nodes that become rows."""
    row_source: Tensor
    """[b] source of those."""
    mask: Tensor | None
    """[b, rows so far + b] additive, verified rows left out; None: every row sees every row so far."""


class _Static:
    def __init__(self, tree: StaticTree, session: Eagle3Session) -> None:
        paths = sorted((tuple(branch) for branch in tree.branches), key=lambda path: (len(path), path))
        places = {(): -1} | {path: i for i, path in enumerate(paths)}
        self.parents = [places[path[:-1]] for path in paths]
        drafting = [path for path in paths if any(other[:-1] == path for other in paths)]  # these are rows
        self.num_rows = len(drafting)
        self.levels: list[_Level] = []
        for depth in range(1, tree.depth + 1):
            nodes = [path for path in paths if len(path) == depth]
            before = [path for path in [(), *drafting] if len(path) == depth - 1]
            rows = [path for path in drafting if len(path) == depth]
            so_far = [path for path in drafting if len(path) <= depth]
            sees = torch.tensor([[other == path[: len(other)] for other in so_far] for path in rows], dtype=torch.bool)
            level = _Level(
                width=1 + max(path[-1] for path in nodes),
                source=_numbers((before.index(path[:-1]) for path in nodes), session),
                rank=_numbers((path[-1] for path in nodes), session),
                rows=_numbers((nodes.index(path) for path in rows), session),
                row_source=_numbers((before.index(path[:-1]) for path in rows), session),
                mask=None if bool(sees.all()) else _mask_of(sees, session),
            )
            self.levels.append(level)

    def grow(self, session: Eagle3Session, hidden: Tensor, temperature: float) -> Proposal:
        """`hidden` [1, H]: recycled state of the last verified row."""
        tokens: list[Tensor] = []
        for depth, level in enumerate(self.levels, start=1):
            best = session.logits(hidden).topk(level.width).indices
            tokens.append(session.target_ids[best[level.source, level.rank]])
            if depth < len(self.levels):
                mask = None if level.mask is None else F.pad(level.mask, (session.verified, 0))
                position = session.verified + depth - 1
                hidden = session.step(tokens[-1][level.rows], hidden[level.row_source], position, mask)
        return Proposal(torch.cat(tokens).tolist(), self.parents)


def _numbers(values: Iterable[int], session: Eagle3Session) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=session.device)


def _mask_of(sees: Tensor, session: Eagle3Session) -> Tensor:
    return torch.zeros(sees.shape, dtype=session.dtype).masked_fill_(~sees, float("-inf")).to(session.device)
