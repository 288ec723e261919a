"""Several sequences side by side: each row is what it is alone, whatever its neighbours do."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from specflow.decoding import batch as batch_module
from specflow.decoding.batch import BatchChainDrafter, generate_batch
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Generation, generate
from specflow.decoding.sampling import GREEDY, Sampling
from specflow.decoding.verify import Proposal
from specflow.drafters.eagle3 import DraftCache, RaggedDraftCache
from specflow.errors import UserError
from tests.decoding import make_draft, make_llama, make_target

V, K, LENGTH = 12, 3, 120  # a vocabulary so small that a random draft is right now and then
PROMPTS = [[1, 4, 2], [7, 7, 3, 0, 5, 9, 11, 2, 4], [6], [3, 8, 1, 1, 10], [2, 2, 2, 2, 9, 5], [11, 0]]


def alone(
    prompts: Sequence[list[int]], *, draft: bool, seeds: Sequence[int] = (), **kwargs: object
) -> list[Generation]:
    target = make_target(make_llama(V), max_length=LENGTH)
    chain = ChainDrafter(Eagle3Session(make_draft(V), target.model.get_input_embeddings().weight, LENGTH))
    return [
        generate(
            target,
            prompt,
            drafter=chain if draft else None,
            num_speculative_tokens=K if draft else 0,
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )
        for prompt, seed in itertools.zip_longest(prompts, seeds or range(len(prompts)))
    ]


def together(
    prompts: Sequence[list[int]], num_rows: int, *, draft: bool, seeds: Sequence[int] = (), **kwargs: object
) -> list[Generation]:
    target = make_target(make_llama(V), num_rows=num_rows, max_length=LENGTH)
    table = target.model.get_input_embeddings().weight
    return generate_batch(
        target,
        prompts,
        drafter=BatchChainDrafter(make_draft(V), table, num_rows, LENGTH) if draft else None,
        num_speculative_tokens=K if draft else 0,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))],
        **kwargs,
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, top_p=0.9, top_k=6)])
@pytest.mark.parametrize("draft", [False, True])
def test_rows_equal_single_runs(draft: bool, sampling: Sampling) -> None:
    """Tokens, steps and reasons, with more prompts than rows and rows that end early; sampled ones by their seeds."""
    plan = {"max_new_tokens": 40, "eos_ids": {10}, "sampling": sampling}
    expected = alone(PROMPTS, draft=draft, **plan)
    for num_rows in (1, 3, 6):
        for single, row in zip(expected, together(PROMPTS, num_rows, draft=draft, **plan), strict=True):
            assert row.token_ids == single.token_ids and row.finish_reason == single.finish_reason
            assert row.steps == single.steps and row.num_cut == single.num_cut
    assert {done.finish_reason for done in expected} == {"stop", "length"}


def test_rows_accept_at_their_own_pace() -> None:
    done = together(PROMPTS, 3, draft=True, max_new_tokens=50, eos_ids=set())
    plain = together(PROMPTS, 3, draft=False, max_new_tokens=50, eos_ids=set())
    accepted = [tuple(count for _, count in row.steps) for row in done]
    assert {count for row in accepted for count in row} >= {0, 1} and len(set(accepted)) == len(accepted)
    assert len({len(row.steps) for row in done}) > 1
    for row, base in zip(done, plain, strict=True):
        assert row.token_ids == base.token_ids
        assert len(row.token_ids) == 50 == 1 + sum(count + 1 for _, count in row.steps) - row.num_cut
        assert all(drafted == K for drafted, _ in row.steps) and base.steps == [(0, 0)] * 49


@pytest.mark.parametrize("draft", [False, True])
def test_a_sampled_row_does_not_depend_on_its_neighbours(draft: bool) -> None:
    plan = {"max_new_tokens": 24, "eos_ids": set(), "sampling": Sampling(1.0)}
    first = together([PROMPTS[1], PROMPTS[0], PROMPTS[2]], 3, draft=draft, seeds=[5, 6, 7], **plan)[0]
    second = together([PROMPTS[4], PROMPTS[3], PROMPTS[1], PROMPTS[5]], 4, draft=draft, seeds=[1, 2, 5, 3], **plan)[2]
    assert first.token_ids == second.token_ids and first.steps == second.steps
    other = together([PROMPTS[1]], 1, draft=draft, seeds=[8], **plan)[0]
    assert other.token_ids != first.token_ids


def test_ragged_draft_rows_equal_single_ones() -> None:
    """Recycled states and caches of three sequences that grow by 3, 1 and 2 rows, then lose some and grow again."""
    draft, generator = make_draft(V, norm_before_residual=True), torch.Generator().manual_seed(4)
    ragged = RaggedDraftCache(draft.config, 3, 40, torch.float32)
    single = [DraftCache(draft.config, 40, torch.float32) for _ in range(3)]
    for counts, kept in (
        ([5, 1, 9], [5, 1, 9]),
        ([3, 1, 2], [2, 1, 0]),
        ([1, 1, 1], [1, 1, 1]),
        ([2, 4, 1], [2, 4, 1]),
    ):
        n = max(counts)
        embeddings, hidden = torch.randn(2, 3, n, 32, generator=generator)
        before = ragged.lengths.clone()
        got = draft.decode_rows(embeddings, hidden, ragged)
        ragged.lengths = before + torch.tensor(kept)
        for row, cache in enumerate(single):
            expected = draft.decode(embeddings[row, : counts[row]], hidden[row, : counts[row]], cache)
            torch.testing.assert_close(got[row, : counts[row]], expected, atol=1e-5, rtol=1e-5)
            cache.length = int(ragged.lengths[row])
    ragged.move_row(2, 0)
    one = torch.randn(2, 1, 1, 32, generator=generator)
    assert int(ragged.lengths[0]) == single[2].length
    torch.testing.assert_close(
        draft.decode_rows(one[0], one[1], ragged)[0],
        draft.decode(one[0, 0], one[1, 0], single[2]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_times_of_rows_add_up_to_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks at each reading: three readings a step, two an admission."""
    monkeypatch.setattr(batch_module, "clock_of", lambda device: itertools.count().__next__)
    done = together(PROMPTS, 4, draft=True, max_new_tokens=20, eos_ids=set())
    decode, draft, verify = (sum(getattr(row, name) for row in done) for name in ("decode_s", "draft_s", "verify_s"))
    assert draft == pytest.approx(verify) and decode == pytest.approx(2 * draft)
    assert all(row.prefill_s == 1 for row in done)
    assert round(draft) >= max(len(row.steps) for row in done) and draft == pytest.approx(round(draft))


def test_a_proposal_is_the_chain_of_each_row() -> None:
    target = make_target(make_llama(V), max_length=LENGTH)
    table = target.model.get_input_embeddings().weight
    chain = ChainDrafter(Eagle3Session(make_draft(V), table, LENGTH))
    rows = BatchChainDrafter(make_draft(V), table, 3, LENGTH)
    generator = torch.Generator().manual_seed(2)
    histories = [torch.randint(V, (n,), generator=generator).tolist() for n in (9, 4, 6)]
    aux = [torch.randn(len(history) - 1, 3 * 32, generator=generator) for history in histories]
    known = [5, 2, 4]
    expected: list[Proposal] = []
    for row, (history, states, n) in enumerate(zip(histories, aux, known, strict=True)):
        rows.start(row, history[: n + 1], states[:n])
        chain.start(history[: n + 1], states[:n])
        expected.append(chain.propose(history, states[n - 1 :], 4, GREEDY, None))
    states = [states[n - 1 :] for states, n in zip(aux, known, strict=True)]
    proposals = rows.propose(histories, states, 4, GREEDY, [None] * 3)
    assert [p.token_ids for p in proposals] == [p.token_ids for p in expected]


def test_a_prompt_that_does_not_fit_is_named_before_any_work() -> None:
    with pytest.raises(UserError, match="prompt of 9 tokens, 110 new and 3 drafted need 122"):
        together(PROMPTS, 2, draft=True, max_new_tokens=110, eos_ids=set())
