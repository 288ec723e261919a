"""Which records are parts of one conversation, so that a split by conversation can keep them together.

Data sets cut long conversations into records: ShareGPT's `<id>_<n>`, or one id in several records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

ID_KEYS = ("conversation_id", "conversation_hash", "message_tree_id", "dialogue_id", "dialog_id", "session_id", "id")
"""Where layouts carry a conversation's id, the most explicit first."""
_PART = re.compile(r"(?P<stem>.+?)[_-](?:part[_-]?)?\d+")


def conversation_id(record: dict[str, Any]) -> str | None:
    """Id of the conversation that a record is (a part of), without the number of the part; None where it has none."""
    value = next((record[key] for key in ID_KEYS if record.get(key) not in (None, "")), None)
    if not isinstance(value, str | int):
        return None
    part = _PART.fullmatch(str(value).strip())
    return part["stem"] if part else str(value).strip()


def usable_ids(ids: Iterable[str | None]) -> set[str]:
    """Those of a source's ids that name conversations.

    An id with more records than the source has ids is no conversation but the name before a running number
    (`sample_1`, `sample_2`, ...), or a constant.
    """
    sizes = Counter(each for each in ids if each is not None)
    return {each for each, size in sizes.items() if size <= len(sizes)}


def related(places: Sequence[tuple[bytes, bytes]], chosen: Iterable[tuple[bytes, bytes]]) -> set[tuple[bytes, bytes]]:
    """All of `places`, (conversation, first user turn), that share either with `chosen`, at any number of steps.

    A copy of a conversation under another id begins with the same turn, and its further parts belong to it too.
    """
    groups: dict[bytes, set[bytes]] = {}
    firsts: dict[bytes, set[bytes]] = {}
    for group, first in places:
        groups.setdefault(group, set()).add(first)
        firsts.setdefault(first, set()).add(group)
    found: set[tuple[bytes, bytes]] = set()
    waiting = {group for group, _ in chosen}
    seen = set(waiting)
    while waiting:
        group = waiting.pop()
        for first in groups.get(group, ()):
            found.add((group, first))
            waiting |= firsts[first] - seen
            seen |= firsts[first]
    return found
