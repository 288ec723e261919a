"""Batch-1 generation, with or without a draft: one loop, so that a comparison compares drafting and nothing else.

Without a draft every step verifies an empty proposal, which is plain decoding. Both sides count generated token ids.

Accounting: the first token comes from the prompt's forward and belongs to no step. Each verification step emits its
accepted drafts and one token of the target's. The last step may be cut by `max_new_tokens` or an end-of-turn token;
`steps` still counts what was accepted there, `num_cut` what of it was not emitted, so that always
len(token_ids) = 1 + sum(accepted + 1) - num_cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from specflow.decoding.sampling import GREEDY, Sampling
from specflow.decoding.verify import NOTHING, Proposal, verify
from specflow.device import wait
from specflow.errors import UserError
from specflow.model_time import MODEL_TIME
from specflow.targets.cached import CachedTarget


class Drafter(Protocol):
    """Proposes tokens for one sequence at a time: `ChainDrafter`, `TreeDrafter`, `LookupDrafter`."""

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        """Begin a sequence: `history` [n + 1] tokens, of which the first n have aux rows [n, A * H]."""

    def max_nodes(self, num_tokens: int) -> int:
        """Most tokens in a proposal of depth `num_tokens`: rows of the target's cache beyond the last token."""

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Draft paths of at most `num_tokens` tokens after `history`. `aux` [n, A * H] are the rows of the n positions
        verified since the last call: those before the last token.
        """


@dataclass
class Generation:
    token_ids: list[int]
    """Generated ids, the end-of-turn token included."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(drafted nodes, length of the accepted path) of each verification step."""
    num_cut: int = 0
    """Verified tokens of the last step that were not emitted."""
    prefill_s: float = 0.0
    """Prompt forward (target and draft) and the first token."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    """All of a step but its draft: the forward, what of it is kept, and the bookkeeping."""
    decode_s: float = 0.0
    """Everything after the prefill: draft_s and verify_s."""
    model_s: float = 0.0
    """Part of decode_s inside calls of the target and of the draft: their layers and heads, nothing around them."""
    finish_reason: Literal["stop", "length"] = "length"

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


@torch.inference_mode()
def generate(
    target: CachedTarget,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    drafter: Drafter | None = None,
    num_speculative_tokens: int = 0,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue `prompt_ids` until an end-of-turn token or `max_new_tokens`.

    `num_speculative_tokens` is the length of a chain, the depth of a tree. `target` has one row, which is overwritten;
    `generator` lives on its device. Raises UserError where prompt, new tokens and drafts do not fit the target's cache.
    """
    num_nodes = drafter.max_nodes(num_speculative_tokens) if drafter is not None else 0
    check_fits(len(prompt_ids), max_new_tokens, num_nodes, target.max_length)
    clock = clock_of(target.device)
    began = clock()
    target.lengths[0] = 0
    hidden = target.forward(torch.tensor([list(prompt_ids)]))
    logits = target.logits(hidden[0, -1:])
    first = verify(NOTHING, logits, sampling, generator).next_token
    history = [*prompt_ids, first]
    aux = target.aux()[0] if drafter is not None and target.aux_layer_ids else None
    done = Generation([])
    limit = len(prompt_ids) + max_new_tokens
    ended = emit(done, history, [first], eos_ids, limit)
    if drafter is not None and not ended:
        drafter.start(history, aux)
        aux = None if aux is None else aux[-1:]
    at = clock()
    done.prefill_s, inside = at - began, MODEL_TIME.seconds()

    while not ended:
        proposal = NOTHING
        if drafter is not None:
            proposal = drafter.propose(history, aux, num_speculative_tokens, sampling, generator)
        drafted_at = clock()
        hidden = target.forward(torch.tensor([[history[-1], *proposal.token_ids]]), parents=proposal.parents)
        verdict = verify(proposal, target.logits(hidden[0]), sampling, generator)
        target.keep(verdict.path)
        emitted = [*(proposal.token_ids[node] for node in verdict.path), verdict.next_token]
        if drafter is not None and aux is not None:
            aux = target.aux()[0]
        history.extend(emitted)
        done.steps.append((len(proposal.token_ids), verdict.accepted))
        ended = emit(done, history, emitted, eos_ids, limit)
        done.draft_s, at = done.draft_s + drafted_at - at, clock()
        done.verify_s += at - drafted_at
    done.decode_s, done.model_s = done.draft_s + done.verify_s, MODEL_TIME.seconds() - inside
    return done


def emit(done: Generation, history: Sequence[int], emitted: list[int], eos_ids: Collection[int], limit: int) -> bool:
    """Add the tokens of a step up to an end-of-turn token or the limit; return whether that ended the generation."""
    room = limit - (len(history) - len(emitted))
    end = next((i + 1 for i, token in enumerate(emitted) if token in eos_ids), None)
    kept = min(room, len(emitted) if end is None else end)
    done.token_ids.extend(emitted[:kept])
    done.num_cut = len(emitted) - kept
    if kept == end:
        done.finish_reason = "stop"
    return kept in (end, room)


def check_fits(num_prompt_tokens: int, max_new_tokens: int, num_drafted: int, max_length: int) -> None:
    """Raise UserError unless a prompt leaves room for its answer and for `num_drafted` nodes drafted beyond it."""
    needed = num_prompt_tokens + max_new_tokens + num_drafted
    if num_prompt_tokens < 1:
        raise UserError("prompt has no tokens: give at least one")
    if needed > max_length:
        raise UserError(
            f"prompt of {num_prompt_tokens} tokens, {max_new_tokens} new and {num_drafted} drafted need "
            f"{needed}, the context holds {max_length}: shorten the prompt, lower max_new_tokens or draft less"
        )


def clock_of(device: torch.device) -> Callable[[], float]:
    """A wall clock in seconds that waits for the device first, so that a reading ends the work before it."""

    def read() -> float:
        wait(device)
        return time.perf_counter()

    return read
