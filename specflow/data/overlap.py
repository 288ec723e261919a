"""Whether two texts say the same: a whole turn, or a run of 13 words (GPT-3's measure, arXiv 2005.14165, C).

A script without blanks has no words to count, so there each letter is a unit of its own that counts for the share of a
word that it is on average: a run of 13 words is 22 Han characters, 26 kana or 44 Thai letters, and a mixed text adds
up. Case, punctuation, blanks and the width of letters do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex

RUN_WORDS = 13
_WORD = 10
_LETTERS = {
    r"\p{Han}": 6,  # a Chinese word has 1.6 characters on average
    r"\p{Hiragana}\p{Katakana}ー": 5,  # Japanese, kanji and kana together: about 2
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}": 3,  # 3 to 3.5 letters, marks not counted
}
"""Scripts without blanks, and what a letter of them counts; a word elsewhere counts `_WORD`."""
_ASCII_WORD = re.compile(r"\w+")
_ALL = "".join(_LETTERS)
_UNIT = regex.compile(
    "|".join(rf"(?P<w{count}>[[{script}]&&\p{{L}}]\p{{M}}*)" for script, count in _LETTERS.items())
    + rf"|(?P<w{_WORD}>[[\p{{L}}\p{{N}}\p{{M}}_\u200c\u200d]--[[{_ALL}]&&\p{{L}}]]+)",
    regex.V1,
)


@lru_cache(maxsize=16)  # a text is looked at once as a whole turn and once for each set of turns
def units(text: str) -> tuple[list[str], list[int]]:
    """Words of `text`, and letters of scripts without blanks; what each counts (a word: 10)."""
    plain = unicodedata.normalize("NFKC", text).lower()
    if plain.isascii():  # as _UNIT, in a fifth of the time
        words = _ASCII_WORD.findall(plain)
        return words, [_WORD] * len(words)
    found = [(match[0], int(match.lastgroup[1:])) for match in _UNIT.finditer(plain)]
    return [unit for unit, _ in found], [count for _, count in found]


def normalise_text(text: str) -> str:
    """What two equal turns have in common: their units, one blank between them."""
    return " ".join(units(text)[0])


def runs(text: str) -> Iterator[str]:
    """Every run of 13 words in `text`: from each unit on, the fewest that count for as much."""
    found, counts = units(text)
    end = counted = 0
    for start, count in enumerate(counts):
        while counted < RUN_WORDS * _WORD:
            if end == len(found):
                return
            counted += counts[end]
            end += 1
        yield " ".join(found[start:end])
        counted -= count


class Turns:
    """Turns that other conversations must not repeat, each under the name of what it belongs to."""

    def __init__(self, turns: Iterable[tuple[str, str]], *, most_names: int | None = None) -> None:
        """`turns` are (name, text). What more than `most_names` of them share is nobody's own and not held against
        anyone: "go on", or the instruction that a data set puts before every question.
        """
        self._whole: dict[str, set[str]] = {}
        self._runs: dict[str, set[str]] = {}
        for name, text in turns:
            self._whole.setdefault(normalise_text(text), set()).add(name)
            for run in runs(text):
                self._runs.setdefault(run, set()).add(name)
        if most_names is not None:
            self._whole = {text: names for text, names in self._whole.items() if len(names) <= most_names}
            self._runs = {run: names for run, names in self._runs.items() if len(names) <= most_names}

    def repeated_by(self, messages: Iterable[dict[str, str]]) -> str | None:
        """Name of what shares a whole user turn, or 13 words in a row of any message, with `messages`; else None."""
        for message in messages:
            if message["role"] == "user" and (names := self._whole.get(normalise_text(message["content"]))):
                return min(names)
            for run in runs(message["content"]):
                if run in self._runs:
                    return min(self._runs[run])
        return None
