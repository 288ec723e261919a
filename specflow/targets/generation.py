"""The in-process engine of the `sample` stage: the target answers whole conversations by continuous batching.

A slot of the key/value cache holds one conversation for all its turns, so history is never computed twice and generated
tokens are never tokenised again. Owns no files: `complete` takes conversations and yields completed ones in any order,
which is all that another engine has to do.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specflow.data import template
from specflow.errors import UserError
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_TOKENS = 64
"""History tokens waiting over all slots that are worth a forward; fewer are fed along with the decoding."""
PREFILL_BATCH_TOKENS = 4096
"""Tokens of one prefill forward, padding included: bounds its memory."""


@dataclass(frozen=True)
class Conversation:
    """What an engine is asked: the user turns of `messages` in order, after their system message if there is one."""

    id: str
    category: str
    messages: list[dict[str, str]]
    temperature: float
    """0 is greedy."""
    seed: int


@dataclass
class _Slot:
    """A conversation under way; its row of the cache holds a prefix of `tokens`."""

    conversation: Conversation
    questions: deque[str]
    messages: list[dict[str, str]]
    tokens: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    answer_start: int = 0
    answer_limit: int = 0
    """Length of `tokens` at which the current answer is cut."""
    uniforms: list[float] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Finished rows of a conversation whose template rewrites history."""
    num_turns: int = 0


def complete(
    conversations: Sequence[Conversation],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    max_length_tokens: int,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yield {"id", "rows"} for each conversation as it is completed; `rows` are sample rows without engine and split.

    A row: id, category, token_ids, spans (half-open, generated tokens with the end token), turns (text, finish_reason),
    temperature, seed. A conversation ends after its last question, after an answer cut by `max_new_tokens`, or before a
    question whose answer might not fit `max_length_tokens`. A template that rewrites history splits a conversation into
    rows "<id>#<turn>". Raises UserError where a first prompt leaves no room for an answer, or logits are not finite.
    """
    if conversations:
        engine = _Engine(model, tokenizer, eos_token_ids, max_new_tokens, max_length_tokens)
        yield from engine.run(conversations, batch_size)


class _Engine:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        max_length_tokens: int,
    ) -> None:
        self.model, self.tokenizer = optimise_for_inference(model), tokenizer
        self.eos = frozenset(eos_token_ids)
        self.max_new_tokens, self.max_length_tokens = max_new_tokens, max_length_tokens
        self.slots: list[_Slot] = []  # slot i uses row i of the cache: the rows in use are always the first ones

    def run(self, conversations: Sequence[Conversation], batch_size: int) -> Iterator[dict[str, Any]]:
        begun = [self._begin(conversation) for conversation in conversations]
        # longest first: rows side by side are then of similar length, and the last ones to finish are short
        waiting = deque(sorted(begun, key=lambda slot: (-self._expected_tokens(slot), slot.conversation.id)))
        num_rows, max_length = min(batch_size, len(begun)), max(slot.answer_limit for slot in begun)
        self.target = CachedTarget(self.model, num_rows=num_rows, max_length=max_length)
        try:
            while self.slots or waiting:
                while waiting and len(self.slots) < self.target.num_rows:
                    self.target.lengths[len(self.slots)] = 0
                    self.slots.append(waiting.popleft())
                self._step()
                for row in reversed(range(len(self.slots))):
                    if self._answered(row) and (done := self._next_turn(row)):
                        yield done
                        self._release(row, waiting)
        finally:
            self.target.close()

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        return template.end_of_turn(self.tokenizer)

    def _begin(self, conversation: Conversation) -> _Slot:
        messages = list(conversation.messages)
        system = [message for message in messages[:1] if message["role"] == "system"]
        questions = deque(message["content"] for message in messages if message["role"] == "user")
        if not questions:
            raise UserError(
                f"sample: conversation {conversation.id} has no user turn: run `dvc repro -f prepare@<family>`"
            )
        slot = _Slot(conversation, questions, [*system, {"role": "user", "content": questions.popleft()}])
        self._ask(slot, self._prompt(slot))
        if slot.answer_limit <= slot.answer_start:
            raise UserError(
                f"sample: prompt of {conversation.id} has {len(slot.tokens)} tokens, leaving no room for an answer "
                f"in {self.max_length_tokens}: lower data.max_prompt_tokens or raise extract.max_length_tokens"
            )
        return slot

    def _prompt(self, slot: _Slot) -> list[int]:
        return template.encode(
            self.tokenizer, template.render(self.tokenizer, slot.messages, add_generation_prompt=True)
        )

    def _expected_tokens(self, slot: _Slot) -> int:
        later = sum(len(question) // 4 + self.max_new_tokens for question in slot.questions)
        return min(slot.answer_limit + later, self.max_length_tokens)

    def _ask(self, slot: _Slot, prompt: list[int]) -> None:
        """Let the slot generate after `prompt`, which becomes its whole history."""
        slot.tokens = prompt
        slot.answer_start = len(prompt)
        slot.answer_limit = min(len(prompt) + self.max_new_tokens, self.max_length_tokens)
        if (
            slot.conversation.temperature > 0
        ):  # a stream per turn: independent of the batch, of other turns and of resume
            name = f"{slot.conversation.seed}:{slot.conversation.id}:{slot.num_turns}"
            stream = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
            count = slot.answer_limit - slot.answer_start
            slot.uniforms = torch.rand(max(count, 0), generator=stream, dtype=torch.float64).tolist()

    def _step(self) -> None:
        """One forward: of the waiting history where there is enough of it, else of the next token of every row."""
        cached = self.target.lengths.tolist()
        left = [len(slot.tokens) - cached[row] for row, slot in enumerate(self.slots)]
        behind = sorted(
            (row for row, count in enumerate(left) if count > 1), key=lambda row: (cached[row] > 0, left[row])
        )
        if sum(left[row] for row in behind) >= PREFILL_TOKENS:
            for rows in self._prefill_batches(behind, left, cached):
                self._prefill(rows, left, cached)
            return
        tokens = torch.tensor([[slot.tokens[cached[row]]] for row, slot in enumerate(self.slots)])
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
            too_large = padded > PREFILL_BATCH_TOKENS or history + width > self.max_length_tokens
            if batch and (wasteful or too_large):
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def _prefill(self, rows: list[int], left: list[int], cached: list[int]) -> None:
        counts = [left[row] for row in rows]
        tokens = torch.zeros(len(rows), max(counts), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : counts[i]] = torch.tensor(self.slots[row].tokens[cached[row] :])
        self._reserve(max(cached[row] for row in rows) + max(counts))
        states = self.target.forward(tokens, rows=rows, counts=counts)
        last = torch.tensor(counts, device=states.device) - 1
        self._append(rows, states[torch.arange(len(rows), device=states.device), last])

    def _reserve(self, length: int) -> None:
        """Room is added in steps: the longest conversation is not known, and memory may not hold the limit for all."""
        if length > self.target.max_length:
            self.target.reserve(min(max(length, self.target.max_length * 5 // 4), self.max_length_tokens))

    def _append(self, rows: list[int], states: Tensor) -> None:
        """Give each of `rows` its next token, from its last state [n, hidden]."""
        slots = [self.slots[row] for row in rows]
        logits = self.target.logits(states)
        best, greedy = logits.max(dim=-1)
        if not bool(torch.isfinite(best).all()):
            bad = slots[int((~torch.isfinite(best)).nonzero()[0])].conversation.id
            raise UserError(
                f"sample: logits of row {bad} are not finite: the target overflows in its dtype, set target.dtype"
            )
        tokens = greedy.tolist()
        hot = [i for i, slot in enumerate(slots) if slot.conversation.temperature > 0]
        if hot:
            uniforms = [slots[i].uniforms[len(slots[i].tokens) - slots[i].answer_start] for i in hot]
            temperatures = [slots[i].conversation.temperature for i in hot]
            for i, token in zip(hot, draw(logits[hot], temperatures, uniforms).tolist(), strict=True):
                tokens[i] = token
        for slot, token in zip(slots, tokens, strict=True):
            slot.tokens.append(token)

    def _answered(self, row: int) -> bool:
        slot = self.slots[row]
        generated = len(slot.tokens) > slot.answer_start
        return generated and (slot.tokens[-1] in self.eos or len(slot.tokens) >= slot.answer_limit)

    def _next_turn(self, row: int) -> dict[str, Any] | None:
        """Close the answer and put the next question; the finished conversation where there is none."""
        slot = self.slots[row]
        stopped = slot.tokens[-1] in self.eos
        slot.spans.append([slot.answer_start, len(slot.tokens)])
        text = self.tokenizer.decode(
            slot.tokens[slot.answer_start : len(slot.tokens) - stopped], skip_special_tokens=True
        )
        slot.turns.append({"text": text, "finish_reason": "stop" if stopped else "length"})
        slot.num_turns += 1
        if not stopped or not slot.questions:
            return self._finish(slot)
        question = slot.questions.popleft()
        suffix = None
        if slot.tokens[-1] == self.end_of_turn:
            suffix = template.next_turn_suffix(self.tokenizer, slot.messages, text, question)
        slot.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
        if suffix is None:  # the template writes this history otherwise: what follows is another sequence
            prompt = self._prompt(slot)
        else:
            prompt = slot.tokens + template.encode(self.tokenizer, suffix)
        if len(prompt) + self.max_new_tokens > self.max_length_tokens:
            return self._finish(slot)
        if suffix is None:
            slot.parts.append(self._row(slot, split=True))
            slot.spans, slot.turns = [], []
            self.target.lengths[row] = 0
        self._ask(slot, prompt)
        return None

    def _row(self, slot: _Slot, *, split: bool) -> dict[str, Any]:
        conversation = slot.conversation
        return {
            "id": f"{conversation.id}#{slot.num_turns - 1}" if split else conversation.id,
            "category": conversation.category,
            "token_ids": list(slot.tokens),
            "spans": slot.spans,
            "turns": slot.turns,
            "temperature": conversation.temperature,
            "seed": conversation.seed,
        }

    def _finish(self, slot: _Slot) -> dict[str, Any]:
        rows = [*slot.parts, self._row(slot, split=bool(slot.parts))]
        return {"id": slot.conversation.id, "rows": rows}

    def _release(self, row: int, waiting: deque[_Slot]) -> None:
        """Give the row to the next conversation, or close the gap so that idle rows cost nothing."""
        if waiting:
            self.slots[row] = waiting.popleft()
            self.target.lengths[row] = 0
            return
        last = self.slots.pop()
        if row < len(self.slots):
            self.slots[row] = last
            self.target.move_row(len(self.slots), row)


def draw(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    """Token ids [n] drawn from softmax(logits [n, vocab] / temperature), inverting its cumulative sum at `uniforms`."""
    scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    cumulative = (logits.float() / scale[:, None]).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    at = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    # the first entry above `at` has a positive probability: its predecessor is not above
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
