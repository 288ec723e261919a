"""Prompt lookup: the longest suffix, at its most recent earlier place, or at its first as transformers has it."""

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from specflow.decoding.lookup import LookupDrafter
from specflow.decoding.sampling import GREEDY


def propose(history: list[int], num_tokens: int = 3) -> list[int]:
    drafter = LookupDrafter()
    drafter.start(history, None)
    return drafter.propose(history, None, num_tokens, GREEDY, None).token_ids


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
        assert drafter.propose(history[:end], None, 4, GREEDY, None).token_ids == propose(history[:end], 4)


@pytest.mark.parametrize("ngram", [1, 2, 4])
def test_earliest_is_what_transformers_proposes(ngram: int) -> None:
    """Against its own candidate generator, at every length of texts with many repeats."""
    theirs = PromptLookupCandidateGenerator(num_output_tokens=3, max_matching_ngram_size=ngram, max_length=10_000)
    generator = torch.Generator().manual_seed(0)
    for vocab in (2, 4, 12):
        history = torch.randint(vocab, (60,), generator=generator).tolist()
        ours = LookupDrafter(ngram, earliest=True)
        ours.start(history[:2], None)
        differ = 0
        for end in range(2, len(history)):
            ids, _ = theirs.get_candidates(torch.tensor([history[:end]]))
            proposed = ours.propose(history[:end], None, 3, GREEDY, None).token_ids
            assert proposed == ids[0, end:].tolist()
            differ += proposed != propose(history[:end])
        assert differ > 0
