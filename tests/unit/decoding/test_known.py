"""Drafters that know the answer: acceptance K + 1 and 1 exactly, through the real loop."""

import pytest

from specflow.decoding.generate import generate
from specflow.decoding.known import KnownAnswerDrafter
from tests.decoding import make_llama, make_target

V, PROMPT = 64, [5, 9, 2, 40, 7, 7, 31]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_always_right_and_always_wrong(k: int) -> None:
    target, steps = make_target(make_llama(V)), 8
    plain = generate(target, PROMPT, max_new_tokens=1 + steps * (k + 1), eos_ids=set())
    for right, expected in ((True, [(k, k)] * steps), (False, [(k, 0)] * steps * (k + 1))):
        drafter = KnownAnswerDrafter(right, V)
        for _ in range(2):  # one request after another
            drafter.expect(plain.token_ids)
            done = generate(
                target,
                PROMPT,
                max_new_tokens=len(plain.token_ids),
                eos_ids=set(),
                drafter=drafter,
                num_speculative_tokens=k,
            )
            assert done.token_ids == plain.token_ids and done.num_cut == 0
            assert done.steps == expected
            assert 1 + sum(accepted for _, accepted in done.steps) / len(done.steps) == (k + 1 if right else 1)


def test_the_end_of_a_known_answer() -> None:
    """The right draft stops with the answer; the wrong one goes on drafting, so that every verification costs K + 1."""
    target = make_target(make_llama(V))
    plain = generate(target, PROMPT, max_new_tokens=30, eos_ids=set()).token_ids
    end = next(i for i in range(6, 30) if plain[i] not in plain[:i])
    answer = generate(target, PROMPT, max_new_tokens=30, eos_ids={plain[end]})
    assert answer.finish_reason == "stop" and len(answer.token_ids) == end + 1
    results = {}
    for right in (True, False):
        drafter = KnownAnswerDrafter(right, V)
        drafter.expect(answer.token_ids)
        done = generate(
            target, PROMPT, max_new_tokens=30, eos_ids={plain[end]}, drafter=drafter, num_speculative_tokens=4
        )
        assert done.token_ids == answer.token_ids and done.finish_reason == "stop"
        results[right] = done.steps
    full, left = divmod(end, 5)
    assert results[True] == [(4, 4)] * full + ([(left, left)] if left else [])
    assert results[False] == [(4, 0)] * end
