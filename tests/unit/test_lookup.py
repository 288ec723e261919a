"""Prompt lookup: the longest suffix, at its most recent earlier place."""

import pytest

from specflow.decoding.lookup import LookupDrafter


def propose(history: list[int], num_tokens: int = 3) -> list[int]:
    drafter = LookupDrafter()
    drafter.start(history, None)
    return drafter.propose(history, None, num_tokens, 0.0, None).token_ids


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2]),  # most recent
        ([1, 2, 3, 7, 2, 3, 6, 1, 2, 3], [7, 2, 3]),  # longer beats more recent
        ([5, 5], [5]),  # fewer than asked
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_proposals(history: list[int], expected: list[int]) -> None:
    assert propose(history) == expected


def test_never_more_than_asked() -> None:
    assert propose([1, 2, 3, 4, 1], num_tokens=2) == [2, 3]


def test_incremental_equals_fresh() -> None:
    history = [int(c) for c in "3141592653589793238462643383279502884197169399375105820974944592307816"]
    drafter = LookupDrafter()
    drafter.start(history[:5], None)
    for end in range(5, len(history), 2):
        assert drafter.propose(history[:end], None, 4, 0.0, None).token_ids == propose(history[:end], 4)
