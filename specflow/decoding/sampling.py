"""How a token is chosen from logits: greedily, or at a temperature from the whole or a truncated distribution.

The one meaning of temperature, top-k and top-p for plain decoding, drafting and verification.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from specflow.device import execution

LEAST_LIKELY = 2.0**-12
"""Tokens as likely as this are looked at for top-p; where they do not reach it, all are."""
LEAST_DRAFTED = 2.0**-8
"""The same for a draft."""


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distributions [..., V] fp32 of logits [..., V]; the temperature is above 0.

        Temperature, then top_k, then top_p, renormalised: the order of transformers and vLLM. Tokens as likely as the
        last one kept are kept too, so that the choice does not hang on a sort's order.
        """
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill_(scores < least, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        if self.top_p < 1.0:
            probs *= probs >= _least_kept(probs, self.top_p)
            probs /= probs.sum(-1, keepdim=True)
        return probs

    def distribution(self, logits: Tensor) -> Dense | Few:
        """What `probabilities` gives for logits [V]: on a CPU as the tokens that are kept, where they are few."""
        return self._few(logits) or Dense(self.probabilities(logits))

    def draft(
        self, logits: Tensor, target_ids: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Dense | Few]:
        """Draw a draft token [1] by logits [D] of the tokens `target_ids` [D], and tell what it was drawn from. On a
        GPU the host does not wait.

        On a CPU from fewer tokens, as a draft may be drawn from anything: those above LEAST_DRAFTED, if any, and not
        more than top_k where several are as likely as the last.
        """
        if few := self._few(logits, drafting=True):
            few = Few(few.probs, target_ids[few.ids].tolist())
            return torch.tensor([few.draw(generator)]), few
        probs = self.probabilities(logits)
        return target_ids[draw(probs[None], generator)], Dense(probs, target_ids)

    def _few(self, logits: Tensor, drafting: bool = False) -> Few | None:
        """What is kept of logits [V], likeliest first, found among few tokens: between two forwards the processor's
        caches hold none of this, so that every operation over a whole row costs as much as the one that picks them.
        None on a GPU, where nothing is cut, and where those few do not reach top_p; a draft takes them then.
        """
        by_count = 0 < self.top_k < len(logits)
        if not execution(logits.device).host_memory or not (by_count or self.top_p < 1.0):
            return None
        values, tokens = self._of_top_k(logits, drafting) if by_count else self._likely_enough(logits, drafting)
        if self.top_p < 1.0:
            reached = list(accumulate(values))
            count = bisect_left(reached, self.top_p) + 1
            if count > len(values) and not (by_count or (drafting and values)):
                return None
            while count < len(values) and values[count] == values[count - 1]:
                count += 1
            values = [value / reached[:count][-1] for value in values[:count]]
        return Few(values, tokens[: len(values)])

    def _of_top_k(self, logits: Tensor, exactly: bool) -> tuple[list[float], list[int]]:
        """Probabilities among the top_k tokens and, not `exactly`, those as likely as the last, and the tokens;
        likeliest first.
        """
        likely, ids = logits.topk(self.top_k + 1)
        scores = likely.float() / self.temperature
        if exactly or scores[-1] < scores[-2]:
            scores, ids = scores[:-1], ids[:-1]
        else:  # further ones may be as likely
            row = logits.float() / self.temperature
            ids = (row >= scores[-1]).nonzero()[:, 0]
            scores, order = row[ids].sort(descending=True, stable=True)
            ids = ids[order]
        return torch.softmax(scores, dim=-1).tolist(), ids.tolist()

    def _likely_enough(self, logits: Tensor, drafting: bool) -> tuple[list[float], list[int]]:
        """Probabilities of the tokens above LEAST_LIKELY or LEAST_DRAFTED, and the tokens; likeliest first."""
        probs = torch.softmax(logits.float() / self.temperature, dim=-1).numpy()
        ids = np.flatnonzero(probs >= (LEAST_DRAFTED if drafting else LEAST_LIKELY))  # topk takes three times as long
        likely = probs[ids]
        order = np.argsort(-likely, kind="stable")
        return likely[order].tolist(), ids[order].tolist()


GREEDY = Sampling()


@dataclass(frozen=True)
class Dense:
    """Probabilities [n], on any device, of the tokens `ids` [n]; without them of all tokens."""

    probs: Tensor
    ids: Tensor | None = None

    def of(self, token: int) -> float:
        return float(self.probs[token] if self.ids is None else (self.probs * (self.ids == token)).sum())

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Tokens and their probabilities."""
        return torch.arange(len(self.probs)) if self.ids is None else self.ids, self.probs

    def minus(self, other: Dense | Few) -> Dense:
        """What it has beyond `other`, not normalised."""
        assert self.ids is None
        ids, probs = (part.to(self.probs.device) for part in other.pairs())
        return Dense(self.probs.index_add(0, ids, probs, alpha=-1).clamp_(min=0.0))

    def total(self) -> float:
        return float(self.probs.sum())

    def draw(self, generator: torch.Generator | None) -> int:
        assert self.ids is None
        return int(draw(self.probs, generator))


@dataclass(frozen=True)
class Few:
    """Probabilities of the few tokens that have one: plain numbers, which cost less than an operation on tensors."""

    probs: list[float]
    ids: list[int]

    def of(self, token: int) -> float:
        return self.probs[self.ids.index(token)] if token in self.ids else 0.0

    def pairs(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.ids), torch.tensor(self.probs)

    def minus(self, other: Dense | Few) -> Few:
        ids, probs = (part.tolist() for part in other.pairs()) if isinstance(other, Dense) else (other.ids, other.probs)
        less = dict(zip(ids, probs, strict=True))
        own = zip(self.ids, self.probs, strict=True)
        return Few([max(0.0, prob - less.get(token, 0.0)) for token, prob in own], self.ids)

    def total(self) -> float:
        return sum(self.probs)

    def draw(self, generator: torch.Generator | None) -> int:
        reached = list(accumulate(self.probs))
        at = torch.rand((), generator=generator, dtype=torch.float64).item() * reached[-1]
        last = bisect_left(reached, reached[-1])  # that has a probability: rounding may put `at` at the end
        return self.ids[bisect_right(reached, at, hi=last)]


def _least_kept(probs: Tensor, top_p: float) -> Tensor:
    """Probability [..., 1] of the last token in the smallest set of likeliest tokens that reaches `top_p`."""
    if execution(probs.device).host_memory:  # numpy sorts 50,000 tokens in 0.1 ms, torch in 3.5
        likely = torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)
    else:
        likely = probs.sort(-1, descending=True).values
    place = (likely.cumsum(-1, dtype=torch.float64) < top_p).sum(-1, keepdim=True)
    return likely.gather(-1, place.clamp_(max=probs.shape[-1] - 1))


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices [...] drawn from non-negative `weights` [..., V], not necessarily normalised; stays on the device.

    By the inverse of the distribution function, in double precision: one random number per draw, where
    `torch.multinomial` takes one per token and waits for a GPU at every call.
    """
    reached = weights.cumsum(-1, dtype=torch.float64)
    at = torch.rand((*weights.shape[:-1], 1), generator=generator, device=weights.device, dtype=torch.float64)
    found = torch.searchsorted(reached, at * reached[..., -1:], right=True)[..., 0]
    return found.clamp_(max=weights.shape[-1] - 1)
