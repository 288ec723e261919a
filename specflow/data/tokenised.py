"""Rows that are tokenised already (`input_ids`, `loss_mask` or `labels`), read back into messages.

Ids do not say which tokenizer and template they come from, so a row counts only if the target's own writes the same
ids again from the messages that were read out of it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.data.groups import ID_KEYS
from specflow.data.layouts import Refused, Turns
from specflow.errors import UserError
from specflow.targets.template import encode_conversation, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USED = {"input_ids", "loss_mask", "labels", "attention_mask", "category", *ID_KEYS}
_IGNORED_LABEL = -100
_OTHER = "input_ids are not what the target's tokenizer and chat template write"
_MARKS = ["\ue000system\ue000", "\ue000one\ue000", "\ue000two\ue000", "\ue000three\ue000", "\ue000four\ue000"]


class TokenReader:
    """What the target's template writes around the turns, to read them out of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> None:
        if tokenizer is None:
            raise UserError(
                f"{path} holds input_ids, which only a target's tokenizer can read: `specflow prepare` does"
            )
        self.tokenizer = tokenizer
        turns = [{"role": ("assistant", "user")[i % 2], "content": _MARKS[i]} for i in range(1, 5)]
        self.first, self.answers, self.asks, _, self.ends = self._pieces(turns, _MARKS[1:])
        try:
            system = {"role": "system", "content": _MARKS[0]}
            self.system = self._pieces([system, turns[0]], _MARKS[:2])[:2]
        except UserError:
            self.system = []

    def _pieces(self, turns: Turns, marks: list[str]) -> list[str]:
        """What stands before, between and behind the contents."""
        text = render(self.tokenizer, turns, add_generation_prompt=False)
        pieces = []
        for mark in marks:
            before, _, text = text.partition(mark)
            pieces.append(before)
        return [*pieces, text]

    def turns_of(self, record: dict[str, Any], unused: Counter[str]) -> Turns:
        """Messages of a row, its last answer only if it is whole. Raises Refused."""
        unused.update(key for key, value in record.items() if key not in _USED and value is not None)
        ids = _integers(record, "input_ids", None)
        if not ids or min(ids) < 0 or max(ids) >= len(self.tokenizer):
            raise Refused(_OTHER)
        if record.get("attention_mask") is not None:
            ids = [i for i, seen in zip(ids, _integers(record, "attention_mask", len(ids)), strict=True) if seen]
        turns = self._parse(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        again, spans = encode_conversation(self.tokenizer, turns)
        whole = min(len(again), len(ids))
        if not spans or again[:whole] != ids[:whole] or spans[-1][1] > whole:
            raise Refused(_OTHER)
        if (mask := _mask(record)) is not None:
            answers = [turn for turn in turns if turn["role"] == "assistant"]
            for turn, (start, end) in zip(answers, spans, strict=True):
                turn["train"] = _trained(mask[start:end])
        return turns

    def _parse(self, text: str) -> Turns:
        turns: Turns = []
        start = self.first
        if self.system and text.startswith(self.system[0]) and self.system[1] in text:
            content, _, text = text.removeprefix(self.system[0]).partition(self.system[1])
            turns.append({"role": "system", "content": content})
            start = ""
        if not text.startswith(start):
            raise Refused(_OTHER)
        text = text.removeprefix(start)
        while self.answers and self.answers in text:
            question, _, text = text.partition(self.answers)
            answer, more, rest = text.partition(self.asks)
            if not more:
                answer, closed, rest = text.partition(self.ends.rstrip())
                if not closed:
                    break
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = rest
        return turns


def _mask(record: dict[str, Any]) -> list[int] | None:
    """1 for tokens to train on, as long as input_ids; None where the row does not say."""
    length = len(_integers(record, "input_ids", None))
    if record.get("loss_mask") is not None:
        return _integers(record, "loss_mask", length)
    if record.get("labels") is not None:
        return [int(label != _IGNORED_LABEL) for label in _integers(record, "labels", length)]
    return None


def _integers(record: dict[str, Any], key: str, length: int | None) -> list[int]:
    values = record[key]
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        (values,) = values  # a batch of one
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise Refused(f"{key} is no list of whole numbers")
    if length is not None and len(values) != length:
        raise Refused(f"{key} is not as long as input_ids")
    return values


def _trained(mask: list[int]) -> bool:
    """Of the tokens of one answer and its end-of-turn token, which some masks leave out."""
    if not any(mask):
        return False
    if not all(mask[:-1]):
        raise Refused("loss_mask cuts through an answer")
    return True
