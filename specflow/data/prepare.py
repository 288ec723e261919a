"""Stage `prepare`: raw sources -> prompts/{train,eval}.jsonl and data_report.json.

Usable conversations of all sources are spooled to a temporary file once, and only their order keys and places
are kept in memory. The order is a hash of seed and conversation (groups.py; without an id, its first user turn): eval
takes from the low end and train from the high end, so that more data or more conversations never move one from eval to
train's side while both ends are apart. What belongs to a conversation of eval stays out of train, and so does what
repeats one of its turns. Checks that cost (overlap, tokens) run in that order, until enough conversations have passed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from specflow.config import Family, Params
from specflow.data.conversations import Conversation, SourceReport, listed, read_conversations
from specflow.data.fit import Fit
from specflow.data.groups import related, usable_ids
from specflow.data.layouts import Refused
from specflow.data.overlap import Turns, normalise_text
from specflow.data.prompt_sets import read_prompt_set
from specflow.errors import UserError
from specflow.files import atomic_path, sha256_json, write_json, write_jsonl
from specflow.paths import Paths
from specflow.sources import resolve
from specflow.targets.model import load_tokenizer, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("specflow")

_COMMON = 2
"""Turns and runs of words that more eval conversations share are the data set's own wording, and may be in train."""
_RELATED = "belongs to a conversation of eval"
_REPEATS = "repeats a turn of eval"


def run(
    name: str, family: Family, params: Params, paths: Paths, log: Callable[[dict[str, float], int], None]
) -> dict[str, float]:
    """Write prompts/: train and eval, with no conversation or turn in common and free of benchmark prompts."""
    facts = read_facts(paths.target)
    if family.data.max_prompt_tokens >= facts.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens {family.data.max_prompt_tokens} leaves no room for an answer "
            f"in the target's context of {facts.max_position_embeddings} tokens: lower it"
        )
    benchmarks = Turns(
        (key, turn)
        for key, source in params.prompt_sets.items()
        for question in read_prompt_set(key, resolve(source, paths.cache))
        for turn in question.turns
    )
    tokenizer = load_tokenizer(facts, paths.cache)
    reports = [SourceReport(" + ".join(source.parts)) for source in family.data.sources]
    dropped: Counter[str] = Counter()
    paths.state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+b", dir=paths.state) as spool:
        order = _spool(_read_all(family, paths.cache, reports, tokenizer), family.data.seed, spool, dropped)
        chooser = _Chooser(family, tokenizer, benchmarks, spool, dropped)
        try:
            chosen = chooser.choose(order)
        finally:
            _say(reports, dropped, chooser.fit.unused)
    report = {
        "sources": [{**vars(report), "damage": report.damage and asdict(report.damage)} for report in reports],
        "distinct_conversations": sum(place.offset >= 0 for place in order),
        "conversation_groups": len({place.group for place in order}),
        "looked_at": chooser.looked_at,
        "dropped_conversations": dict(sorted(dropped.items())),
        **{split: _describe(rows) for split, rows in chosen.items()},
    }
    with atomic_path(paths.prompts) as folder:
        for split, rows in chosen.items():
            write_jsonl(folder / f"{split}.jsonl", (_row(conversation) for conversation, _ in rows))
        write_json(folder / "data_report.json", report)
    return _metrics(reports, order, dropped, chosen)


Chosen = dict[str, list[tuple[Conversation, int]]]
"""Conversations with their prompt tokens, by split."""


def _row(conversation: Conversation) -> dict[str, Any]:
    return {"id": sha256_json(conversation.messages)[:16], **asdict(conversation)}


def _describe(rows: list[tuple[Conversation, int]]) -> dict[str, Any]:
    tokens = [count for _, count in rows]
    return {
        "conversations": len(rows),
        "groups": len({conversation.group for conversation, _ in rows}),
        "user_turns": sum(len(conversation.user_turns) for conversation, _ in rows),
        "by_category": dict(Counter(conversation.category for conversation, _ in rows).most_common()),
        "prompt_tokens": {
            "total": sum(tokens),
            "mean": round(statistics.fmean(tokens), 1),
            "median": statistics.median(tokens),
            "max": max(tokens),
        },
    }


def _metrics(
    reports: list[SourceReport], order: list[Place], dropped: Counter[str], chosen: Chosen
) -> dict[str, float]:
    return {
        "records": sum(report.records for report in reports),
        "dropped_records": sum(report.dropped_records.total() for report in reports),
        "duplicates": dropped["duplicate"],
        "conversation_groups": len({place.group for place in order}),
        "benchmark_overlaps": sum(count for reason, count in dropped.items() if reason.startswith("overlaps ")),
        "eval_relatives": dropped[_RELATED],
        "eval_overlaps": dropped[_REPEATS],
        "bytes_lost": sum(report.damage.bytes_lost for report in reports if report.damage),
        **{f"{split}_conversations": len(rows) for split, rows in chosen.items()},
        **{f"{split}_prompt_tokens": sum(count for _, count in rows) for split, rows in chosen.items()},
    }


def _read_all(
    family: Family, cache: Path, reports: list[SourceReport], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Conversation]:
    for source, report in zip(family.data.sources, reports, strict=True):
        yield from read_conversations(source, resolve(source, cache), report, tokenizer)


def _say(reports: list[SourceReport], dropped: Counter[str], unused: Counter[str]) -> None:
    """What became of everything that was read: a line for each source, and one for what was looked at of them."""
    for report in reports:
        logger.info("prepare: %s", report.line())
    if dropped:
        logger.info("prepare: conversations dropped: %s", listed(dropped))
    if unused:
        logger.info("prepare: parts of conversations not used: %s", listed(unused))


class Place(NamedTuple):
    """Of a conversation in the spool; digests, so that a million of them fit into memory."""

    order: bytes
    """Of seed and group."""
    key: bytes
    """Of all user turns."""
    group: bytes
    first: bytes
    """Of the first user turn."""
    offset: int
    """-1: a duplicate, which only tells that its conversation is another one's too."""


def _spool(conversations: Iterable[Conversation], seed: int, spool: IO[bytes], dropped: Counter[str]) -> list[Place]:
    """Write conversations that are not there yet to `spool`; return the places of all in order."""
    read: list[tuple[str, str | None, bytes, bytes, int]] = []
    seen: set[bytes] = set()
    for conversation in tqdm(conversations, desc="prepare: read", unit=" conversations"):
        turns = [" ".join(turn.lower().split()) for turn in conversation.user_turns]
        key, offset = _hash("\n".join(turns)), spool.tell()
        if key in seen:
            dropped["duplicate"] += 1
            offset = -1
        else:
            spool.write(json.dumps(asdict(conversation), ensure_ascii=False).encode() + b"\n")
        seen.add(key)
        read.append((conversation.source, conversation.group, _hash(turns[0]), key, offset))
    usable = {source: usable_ids(entry[1] for entry in read if entry[0] == source) for source in {e[0] for e in read}}
    places = []
    for source, name, first, key, offset in read:
        group = _hash(name) if name is not None and name in usable[source] else first
        places.append(Place(_hash(f"{seed}\n{group.hex()}"), key, group, first, offset))
    return sorted(places)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class _Chooser:
    """Takes eval and train conversations from the two ends of the order, checking each as it comes."""

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        benchmarks: Turns,
        spool: IO[bytes],
        dropped: Counter[str],
    ) -> None:
        self.family, self.fit, self.benchmarks = family, Fit(family, tokenizer), benchmarks
        self.spool, self.dropped = spool, dropped
        self.held_out = Turns(())  # of eval, once that is chosen
        self.looked_at = 0  # conversations checked before both splits were full
        self.asked: set[bytes] = set()  # what was taken, as cut to max_turns: such a conversation is asked once

    def choose(self, order: list[Place]) -> Chosen:
        data = self.family.data
        whole = [place for place in order if place.offset >= 0]
        evals, used = self._take(whole, data.eval_conversations, "eval")
        relatives = related([(p.group, p.first) for p in order], [(p.group, p.first) for p in whole[:used]])
        rest = [place for place in reversed(whole[used:]) if (place.group, place.first) not in relatives]
        if held_out := len(whole) - used - len(rest):
            self.dropped[_RELATED] = held_out
        self.held_out = Turns(
            ((str(conversation.group), turn) for conversation, _ in evals for turn in conversation.user_turns),
            most_names=_COMMON,
        )
        train, _ = self._take(rest, data.train_conversations, "train")
        if len(train) < data.train_conversations:
            usable = len(train) + len(evals)
            raise UserError(
                f"the sources have {usable} usable conversations, expected {data.train_conversations} to train and "
                f"{data.eval_conversations} to evaluate (dropped: {dict(self.dropped.most_common())}): "
                "lower data.train_conversations or eval_conversations, or add sources"
            )
        return {"train": train, "eval": evals}

    def _take(self, places: list[Place], count: int, split: str) -> tuple[list[tuple[Conversation, int]], int]:
        """Up to `count` conversations that pass every check, and how many places were looked at."""
        taken: list[tuple[Conversation, int]] = []
        with tqdm(total=count, desc=f"prepare: {split}", unit=" conversations") as progress:
            for looked_at, place in enumerate(places):
                if len(taken) == count:
                    return taken, looked_at
                self.spool.seek(place.offset)
                conversation, tokens = self._check(Conversation(**json.loads(self.spool.readline())))
                if conversation is not None:
                    taken.append((replace(conversation, group=place.group.hex()), tokens))
                    progress.update()
        return taken, len(places)

    def _check(self, conversation: Conversation) -> tuple[Conversation | None, int]:
        """The conversation within its limits and its prompt tokens; None, counted, if it may not be used."""
        self.looked_at += 1
        try:
            messages, tokens = self.fit.fit(conversation.messages)
        except Refused as reason:
            return self._drop(str(reason))
        conversation = replace(conversation, messages=messages)
        if (prompt_set := self.benchmarks.repeated_by(messages)) is not None:
            return self._drop(f"overlaps {prompt_set}")
        if self.held_out.repeated_by(messages) is not None:
            return self._drop(_REPEATS)
        key = _hash("\n".join(normalise_text(turn) for turn in conversation.user_turns))
        if key in self.asked:
            return self._drop("duplicate within max_turns")
        self.asked.add(key)
        return conversation, tokens

    def _drop(self, reason: str) -> tuple[None, int]:
        self.dropped[reason] += 1
        return None, 0
