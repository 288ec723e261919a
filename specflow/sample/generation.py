"""The in-process engine of the `sample` stage: the target answers whole conversations by continuous batching.

A slot of the key/value cache holds one conversation for all its turns, so history is never computed twice and generated
tokens are never tokenised again. Owns no files: `complete` takes conversations and yields completed ones in any order,
which is all that another engine has to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specflow.errors import UserError
from specflow.sample.dialogue import Conversation, Dialogue, Turns
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK_TOKENS = 32
"""Tokens of the first prompt on which the decoding is held against transformers' own forward."""
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative error of the logits: fp32 differs by rounding, half dtypes by some percent."""
PREFILL_TOKENS = 64
"""History tokens waiting over all slots that are worth a forward; fewer are fed along with the decoding."""
PREFILL_BATCH_TOKENS = 4096
"""Tokens of one prefill forward, padding included: bounds its memory."""


@dataclass
class _Slot:
    """A conversation under way; its row of the cache holds a prefix of its tokens."""

    dialogue: Dialogue
    stream: torch.Generator | None = None
    """Noise of the current answer, where it is sampled."""


def complete(
    conversations: Sequence[Conversation],
    *,
    model: PreTrainedModel,
    turns: Turns,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yield {"id", "rows"} for each conversation as it is completed; `rows` are sample rows without engine and split.

    A row: id, category, token_ids, spans (half-open, generated tokens with the end token), turns (text, finish_reason),
    temperature, seed. A conversation ends after its last question, after an answer cut by `turns.max_new_tokens`, or
    before a question whose answer might not fit `turns.max_length_tokens`. A template that rewrites history splits a
    conversation into rows "<id>#<turn>". Raises UserError where a first prompt leaves no room for an answer, or logits
    are not finite.
    """
    if conversations:
        yield from _Engine(model, turns).run(conversations, batch_size)


class _Engine:
    def __init__(self, model: PreTrainedModel, turns: Turns) -> None:
        self.model, self.turns = model, turns
        self.slots: list[_Slot] = []  # slot i uses row i of the cache: the rows in use are always the first ones

    def run(self, conversations: Sequence[Conversation], batch_size: int) -> Iterator[dict[str, Any]]:
        begun = [self.turns.begin(conversation) for conversation in conversations]
        self.model = optimised_and_checked(self.model, begun[0].tokens[:CHECK_TOKENS])
        # longest first: rows side by side are then of similar length, and the last ones to finish are short
        begun.sort(key=lambda dialogue: (-self.turns.expected_tokens(dialogue), dialogue.conversation.id))
        waiting = deque(begun)
        num_rows, max_length = min(batch_size, len(begun)), max(dialogue.answer_limit for dialogue in begun)
        self.target = CachedTarget(self.model, num_rows=num_rows, max_length=max_length)
        try:
            while self.slots or waiting:
                while waiting and len(self.slots) < self.target.num_rows:
                    self.target.lengths[len(self.slots)] = 0
                    self.slots.append(_Slot(waiting.popleft()))
                self._step()
                for row in reversed(range(len(self.slots))):
                    if self.turns.answered(self.slots[row].dialogue) and (done := self._next_turn(row)):
                        yield done
                        self._release(row, waiting)
        finally:
            self.target.close()

    def _step(self) -> None:
        """One forward: of the waiting history where there is enough of it, else of the next token of every row."""
        cached = list(self.target.lengths)
        left = [len(slot.dialogue.tokens) - cached[row] for row, slot in enumerate(self.slots)]
        behind = sorted(
            (row for row, count in enumerate(left) if count > 1), key=lambda row: (cached[row] > 0, left[row])
        )
        if sum(left[row] for row in behind) >= PREFILL_TOKENS:
            for rows in self._prefill_batches(behind, left, cached):
                self._prefill(rows, left, cached)
            return
        tokens = torch.tensor([[slot.dialogue.tokens[cached[row]]] for row, slot in enumerate(self.slots)])
        self._reserve(max(cached[: len(self.slots)]) + 1)
        states = self.target.forward(tokens)[:, 0]
        ready = [row for row, count in enumerate(left) if count == 1]
        if ready:
            self._append(ready, states if len(ready) == len(self.slots) else states[ready])

    def _prefill_batches(self, rows: list[int], left: list[int], cached: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for row in rows:
            wider = [*batch, row]
            width, history = max(left[r] for r in wider), max(cached[r] for r in wider)
            padded, real = len(wider) * width, sum(left[r] for r in wider)
            wasteful = padded > 1.2 * real and sum(left[r] for r in batch) >= PREFILL_TOKENS
            too_large = padded > PREFILL_BATCH_TOKENS or history + width > self.turns.max_length_tokens
            if batch and (wasteful or too_large):
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def _prefill(self, rows: list[int], left: list[int], cached: list[int]) -> None:
        counts = [left[row] for row in rows]
        tokens = torch.zeros(len(rows), max(counts), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : counts[i]] = torch.tensor(self.slots[row].dialogue.tokens[cached[row] :])
        self._reserve(max(cached[row] for row in rows) + max(counts))
        states = self.target.forward(tokens, rows=rows, counts=counts)
        last = torch.tensor(counts, device=states.device) - 1
        self._append(rows, states[torch.arange(len(rows), device=states.device), last])

    def _reserve(self, length: int) -> None:
        """Room is added in steps: the longest conversation is not known, and memory may not hold the limit for all."""
        if length > self.target.max_length:
            self.target.reserve(min(max(length, self.target.max_length * 5 // 4), self.turns.max_length_tokens))

    def _append(self, rows: list[int], states: Tensor) -> None:
        """Give each of `rows` its next token, from its last state [n, hidden]."""
        slots = [self.slots[row] for row in rows]
        logits = self.target.logits(states)
        best, greedy = logits.max(dim=-1)
        if not bool(torch.isfinite(best).all()):
            bad = slots[int((~torch.isfinite(best)).nonzero()[0])].dialogue.conversation.id
            raise UserError(
                f"sample: logits of row {bad} are not finite: the target overflows in its dtype, set target.dtype"
            )
        tokens = greedy.tolist()
        dialogues = [slot.dialogue for slot in slots]
        hot = [i for i, dialogue in enumerate(dialogues) if dialogue.conversation.temperature > 0]
        if hot:
            temperatures = [dialogues[i].conversation.temperature for i in hot]
            noise = torch.stack([self._noise(slots[i], logits.shape[-1], logits.device) for i in hot])
            for i, token in zip(hot, draw(logits[hot], temperatures, noise).tolist(), strict=True):
                tokens[i] = token
        for dialogue, token in zip(dialogues, tokens, strict=True):
            dialogue.tokens.append(token)

    @staticmethod
    def _noise(slot: _Slot, count: int, device: torch.device) -> Tensor:
        """Exponential noise [count] of the next token, from a stream per turn: the same in every batch."""
        if slot.stream is None:
            slot.stream = torch.Generator(device).manual_seed(slot.dialogue.answer_seed)
        return torch.empty(count, device=device).exponential_(generator=slot.stream)

    def _next_turn(self, row: int) -> dict[str, Any] | None:
        dialogue = self.slots[row].dialogue
        if done := self.turns.close(dialogue):
            return done
        self.slots[row] = _Slot(dialogue)
        if dialogue.rewritten:
            self.target.lengths[row] = 0
        return None

    def _release(self, row: int, waiting: deque[Dialogue]) -> None:
        """Give the row to the next conversation, or close the gap so that idle rows cost nothing."""
        if waiting:
            self.slots[row] = _Slot(waiting.popleft())
            self.target.lengths[row] = 0
            return
        last = self.slots.pop()
        if row < len(self.slots):
            self.slots[row] = last
            self.target.move_row(len(self.slots), row)


@torch.inference_mode()
def optimised_and_checked(model: PreTrainedModel, token_ids: list[int]) -> PreTrainedModel:
    """The model optimised for inference, in place, once its cached forward was held against transformers' own.

    The median over tokens is compared, as a mixture of experts in a half dtype may route one of them another way.
    Raises UserError where the two differ: an architecture that does something this code does not know.
    """
    ids = torch.tensor([token_ids])
    expected = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
    target = CachedTarget(optimise_for_inference(model), num_rows=2, max_length=len(token_ids))
    half = len(token_ids) // 2
    parts = [target.forward(part, rows=[1]) for part in (ids[:, :half], ids[:, half:]) if part.shape[1]]
    got = target.logits(torch.cat(parts, dim=1))[0].float()
    target.close()
    error = float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    if error >= CHECK_TOLERANCE[model.dtype]:  # not-a-number passes: the first answer names its row
        raise UserError(
            f"sample: cached decoding of {type(model).__name__} differs from transformers' own forward (relative "
            f"error {error:.2g}): this architecture is not supported"
        )
    return model


def draw(logits: Tensor, temperatures: Sequence[float], noise: Tensor) -> Tensor:
    """Token ids [n] drawn from softmax(logits [n, vocab] / temperature): argmax of probability / noise, where `noise`
    [n, vocab] is exponential.

    Not by inverting the cumulative sum: there the rounding of other neighbours in the batch shifts every boundary, and
    an unlikely token's whole interval is narrower than that (6 of 96 answers of 67 tokens came out otherwise).
    """
    scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    return (logits.float() / scale[:, None] - noise.log()).argmax(dim=-1)
