"""A conversation under way: its growing history in tokens, what comes after an answer, and the rows it ends as.

The same for every engine that answers: an engine takes `tokens` as prompt, appends what the target generates, and asks
`Turns.close` for what comes next. Generated tokens are never tokenised again.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError
from specflow.targets import template
from specflow.targets.template import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """What an engine is asked: the user turns of `messages` in order, after their system message if there is one."""

    id: str
    category: str
    messages: list[Message]
    temperature: float
    """0 is greedy."""
    seed: int


@dataclass
class Dialogue:
    conversation: Conversation
    questions: deque[str]
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    answer_start: int = 0
    answer_limit: int = 0
    """Length of `tokens` at which the current answer is cut."""
    rewritten: bool = False
    """The history of the current question is not what was there before it: an engine's cache of it is void."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Finished rows of a conversation whose template rewrites history."""
    num_turns: int = 0

    @property
    def answer_seed(self) -> int:
        """60 bits, one stream per turn: a draw depends neither on other conversations nor on what was resumed."""
        name = f"{self.conversation.seed}:{self.conversation.id}:{self.num_turns}"
        return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)

    def finish(self) -> dict[str, Any]:
        """{"id", "rows"} of what was answered; no row where nothing was."""
        rows = [*self.parts, self._row(split=bool(self.parts))] if self.spans else self.parts
        return {"id": self.conversation.id, "rows": rows}

    def _row(self, *, split: bool) -> dict[str, Any]:
        return {
            "id": f"{self.conversation.id}#{self.num_turns - 1}" if split else self.conversation.id,
            "category": self.conversation.category,
            "token_ids": self.tokens[: self.spans[-1][1]],
            "spans": self.spans,
            "turns": self.turns,
            "temperature": self.conversation.temperature,
            "seed": self.conversation.seed,
        }


class Turns:
    """How conversations of one target go on, and where they end."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        max_length_tokens: int,
        keep_thinking: bool = False,
    ) -> None:
        self.tokenizer, self.eos = tokenizer, frozenset(eos_token_ids)
        self.max_new_tokens, self.max_length_tokens = max_new_tokens, max_length_tokens
        self.keep_thinking = keep_thinking

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        return template.end_of_turn(self.tokenizer)

    def begin(self, conversation: Conversation) -> Dialogue:
        """Raises UserError where the first prompt leaves no room for an answer."""
        questions = [i for i, message in enumerate(conversation.messages) if message["role"] == "user"]
        if not questions:
            raise UserError(
                f"sample: conversation {conversation.id} has no user turn: run `dvc repro -f prepare@<family>`"
            )
        later = deque(conversation.messages[i]["content"] for i in questions[1:])
        dialogue = Dialogue(conversation, later, conversation.messages[: questions[0] + 1])
        self._ask(dialogue, self._prompt(dialogue))
        if dialogue.answer_limit <= dialogue.answer_start:
            raise UserError(
                f"sample: prompt of {conversation.id} has {len(dialogue.tokens)} tokens, leaving no room for an answer "
                f"in {self.max_length_tokens}: lower data.max_prompt_tokens or raise extract.max_length_tokens"
            )
        return dialogue

    def expected_tokens(self, dialogue: Dialogue) -> int:
        """Length of the whole conversation at most, later questions guessed from their characters."""
        later = sum(len(question) // 4 + self.max_new_tokens for question in dialogue.questions)
        return min(dialogue.answer_limit + later, self.max_length_tokens)

    def answered(self, dialogue: Dialogue) -> bool:
        generated = len(dialogue.tokens) > dialogue.answer_start
        return generated and (dialogue.tokens[-1] in self.eos or len(dialogue.tokens) >= dialogue.answer_limit)

    def close(self, dialogue: Dialogue, **about: str) -> dict[str, Any] | None:
        """Close the answer and put the next question; the finished conversation where there is none.

        It ends after its last question, after an answer that was cut, and before a question whose answer might not
        fit. `about` is kept with the turn.
        """
        stopped = dialogue.tokens[-1] in self.eos
        dialogue.spans.append([dialogue.answer_start, len(dialogue.tokens)])
        text = self.tokenizer.decode(
            dialogue.tokens[dialogue.answer_start : len(dialogue.tokens) - stopped], skip_special_tokens=True
        )
        dialogue.turns.append({"text": text, "finish_reason": "stop" if stopped else "length", **about})
        dialogue.num_turns += 1
        if not stopped or not dialogue.questions:
            return dialogue.finish()
        question = dialogue.questions.popleft()
        suffix = self._suffix(dialogue, text, question)
        dialogue.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
        if suffix is None:  # the template writes this history otherwise: what follows is another sequence
            prompt = self._prompt(dialogue)
        else:
            prompt = dialogue.tokens + template.encode(self.tokenizer, suffix)
        if len(prompt) + self.max_new_tokens > self.max_length_tokens:
            return dialogue.finish()
        if suffix is None:
            dialogue.parts.append(dialogue._row(split=True))
            dialogue.spans, dialogue.turns = [], []
        self._ask(dialogue, prompt, rewritten=suffix is None)
        return None

    def _suffix(self, dialogue: Dialogue, text: str, question: str) -> str | None:
        if dialogue.tokens[-1] != self.end_of_turn:
            return None
        if self.keep_thinking:
            return template.suffix_behind_any_answer(self.tokenizer, dialogue.messages, question)
        return template.next_turn_suffix(self.tokenizer, dialogue.messages, text, question)

    def _prompt(self, dialogue: Dialogue) -> list[int]:
        return template.encode(
            self.tokenizer, template.render(self.tokenizer, dialogue.messages, add_generation_prompt=True)
        )

    def _ask(self, dialogue: Dialogue, prompt: list[int], *, rewritten: bool = False) -> None:
        """Let the target generate after `prompt`, which becomes the whole history."""
        dialogue.tokens, dialogue.rewritten = prompt, rewritten
        dialogue.answer_start = len(prompt)
        dialogue.answer_limit = min(len(prompt) + self.max_new_tokens, self.max_length_tokens)
