"""What of a conversation a family can use: with its target's chat template, its limits, its source of answers."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from specflow.data.conversations import is_answered
from specflow.data.layouts import Refused
from specflow.errors import UserError
from specflow.targets import template
from specflow.targets.template import Message, encode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specflow.config import Family


class Fit:
    """Cuts conversations to what the target can be asked, or trained on where the answers are the data set's own."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data, self.tokenizer = family.data, tokenizer
        self.own_answers = family.sample.engine == "dataset"
        self.shown = template.shown_parts(tokenizer)
        self.special = re.compile("|".join(map(re.escape, template.special_tokens(tokenizer))) or r"(?!)")
        self.unused: Counter[str] = Counter()
        """Parts of conversations that were left out, by name."""

    def fit(self, messages: list[Message]) -> tuple[list[Message], int]:
        """The messages that can be used and their prompt tokens. Raises Refused with the reason why none can.

        Tools go where the template shows none. Where the target answers itself, a conversation ends before its first
        tool call, whose result would belong to another answer, and thoughts and marks of answers go with the answers.
        """
        if "tools" in messages[0] and "tools" not in self.shown:
            self.unused["tools, which the chat template does not show"] += 1
            messages = [_without(messages[0], "tools"), *messages[1:]]
        messages = self._own(messages) if self.own_answers else self._asked(messages)
        for message in messages:
            if self.own_answers or message["role"] != "assistant":
                self._check_not_rendered(message)
        try:
            messages, tokens = self._within_limits(messages)
            if self.own_answers:
                messages = _up_to_last_answer(messages)
                template.encode_conversation(self.tokenizer, messages)
        except UserError:  # such as a system message where the template knows none
            raise Refused(f"chat template refuses it (first role {messages[0]['role']})") from None
        return messages, tokens

    def _own(self, messages: list[Message]) -> list[Message]:
        if any("reasoning_content" in message for message in messages) and "reasoning_content" not in self.shown:
            raise Refused("reasoning_content, which the chat template does not show")
        if any("tool_calls" in message for message in messages) and not {"tool_calls", "tool_results"} <= self.shown:
            raise Refused("tool calls, which the chat template does not show")
        return messages

    def _asked(self, messages: list[Message]) -> list[Message]:
        call = next((i for i, message in enumerate(messages) if "tool_calls" in message), len(messages))
        if call < len(messages):
            self.unused["turns from the first tool call on, since the target answers itself"] += 1
        kept = []
        for message in messages[:call]:
            for key, what in (("reasoning_content", "reasoning_content"), ("train", "marks of answers not to train")):
                if key in message:
                    self.unused[f"{what}, since the target answers itself"] += 1
                    message = _without(message, key)
            kept.append(message)
        return kept

    def _check_not_rendered(self, message: Message) -> None:
        for text in (message["content"], message.get("reasoning_content", "")):
            if found := self.special.search(text):
                raise Refused(f"its text holds the special token {found[0]!r}")

    def _within_limits(self, messages: list[Message]) -> tuple[list[Message], int]:
        """Messages up to the last user turn within max_turns and max_prompt_tokens, and its answer; prompt tokens.

        Answers do not count: tokens are those of the first rendered prompt plus those of each later user turn with
        what the template writes around it, and of tool results.
        """
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        total, end = 0, 0
        for start, following in zip(starts, [*starts[1:], len(messages)], strict=True):
            head = messages[: start + 1] if start == starts[0] else [messages[start]]
            results = [message["content"] for message in messages[start:following] if message["role"] == "tool"]
            texts = [render(self.tokenizer, head, add_generation_prompt=True), *results]
            total_then = total + sum(len(encode(self.tokenizer, text)) for text in texts)
            if starts.index(start) == self.data.max_turns or total_then > self.data.max_prompt_tokens:
                break
            total, end = total_then, following
        if end == 0:
            raise Refused("first prompt is longer than max_prompt_tokens")
        return messages[:end], total


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    messages = messages if messages[-1]["role"] == "assistant" else messages[:-1]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not all(map(is_answered, answers)):
        raise Refused("has no answers of its own, which sample.engine dataset needs")
    if not any(message.get("train", True) for message in answers):
        raise Refused("marks every answer as not to be trained")
    return messages


def _without(message: Message, key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}
