"""Decoding on a device: drafts of either dtype lossless on targets of either, batches, sampled choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specflow.bench.statistics.metrics import divergence
from specflow.config_bench import DynamicTree, StaticTree
from specflow.decoding.batch import BatchChainDrafter, generate_batch
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Generation, generate
from specflow.decoding.sampling import Sampling
from specflow.decoding.tree import TreeDrafter
from specflow.decoding.verify import Proposal, verify
from specflow.drafters.inference import place
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from tests.decoding import AUX, KnownTree, fits, make_draft, make_llama

VOCAB = 12
"""So few tokens that a random draft is right now and then."""
NEW = 48
TREES = (
    None,
    DynamicTree(total_token=14, depth=3, top_k=4),
    StaticTree(branches=[[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]),
)
SAMPLINGS = (Sampling(0.8), Sampling(1.0, 0.9), Sampling(0.7, 0.95, 5))


def make_target(device: torch.device, dtype: torch.dtype, num_rows: int = 1) -> CachedTarget:
    model = optimise_for_inference(make_llama(VOCAB).to(device, dtype))
    return CachedTarget(model, num_rows=num_rows, max_length=128, aux_layer_ids=AUX)


def prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB, (4 + 3 * i,), generator=g).tolist() for i in range(count)]


def check_same(target: CachedTarget, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> None:
    """Equal answers; in a half dtype one may part from the other where the target finds two tokens as good to within
    rounding, which differs with the number of rows of a product.
    """
    if got == expected:
        return
    at = divergence(expected, got)
    assert at < min(len(expected), len(got)), "an answer is cut short"
    target.lengths[0] = 0
    hidden = target.forward(torch.tensor([[*prompt, *expected[:at]]]), rows=None if target.num_rows == 1 else [0])
    logits = target.logits(hidden[0, -1]).float()
    room = 4 * torch.finfo(target.model.dtype).eps * float(logits.abs().max())
    assert abs(float(logits[expected[at]] - logits[got[at]])) <= room, f"parts at {at}"


def check_lossless(device: torch.device, target_dtype: torch.dtype, draft_dtype: torch.dtype) -> None:
    """Chain and trees against plain decoding on the same target; a draft in `draft_dtype` is accepted about as often
    as in float32.
    """
    target, prompt = make_target(device, target_dtype), prompts(1)[0]
    table = target.model.get_input_embeddings().weight

    def run(drafter: ChainDrafter | TreeDrafter | KnownTree | None, depth: int) -> Generation:
        drafted = {"drafter": drafter, "num_speculative_tokens": depth}
        return generate(target, prompt, max_new_tokens=NEW, eos_ids=(), **drafted)

    plain = run(None, 0)
    right = KnownTree(prompt, plain.token_ids, None, vocab_size=VOCAB)
    check_same(target, prompt, plain.token_ids, run(right, 12).token_ids)
    for tree in TREES:
        lengths = []
        for dtype in (torch.float32, draft_dtype):
            session = Eagle3Session(place(make_draft(VOCAB), dtype, device), table, target.max_length)
            assert session.draft.d2t.device.type == device.type
            drafter = ChainDrafter(session) if tree is None else TreeDrafter(session, tree)
            got = run(drafter, 3)
            check_same(target, prompt, plain.token_ids, got.token_ids)
            lengths.append(1 + sum(accepted for _, accepted in got.steps) / len(got.steps))
        assert lengths[0] > 1.0 and abs(lengths[1] - lengths[0]) < 0.25


def check_batches(device: torch.device, dtype: torch.dtype) -> None:
    """Ragged rows side by side, more prompts than rows, against each prompt alone and undrafted."""
    alone, target, asked = make_target(device, dtype), make_target(device, dtype, num_rows=3), prompts(5)
    table = target.model.get_input_embeddings().weight
    drafter = BatchChainDrafter(place(make_draft(VOCAB), dtype, device), table, 3, target.max_length)
    found = generate_batch(target, asked, max_new_tokens=24, eos_ids=(), drafter=drafter, num_speculative_tokens=3)
    assert sum(accepted for done in found for _, accepted in done.steps) > 0
    for prompt, done in zip(asked, found, strict=True):
        plain = generate(alone, prompt, max_new_tokens=24, eos_ids=())
        check_same(alone, prompt, plain.token_ids, done.token_ids)


def check_sampling(device: torch.device, dtype: torch.dtype, num_draws: int = 1500) -> None:
    """The token that comes out of drafting and verification has the target's distribution, truncation and all; it is
    the CPU's of the same logits.
    """
    g = torch.Generator().manual_seed(2)
    target, draft = (2.0 * torch.randn(2, VOCAB, generator=g).to(dtype) for _ in range(2))
    ids, generator = torch.arange(VOCAB, device=device), torch.Generator(device).manual_seed(5)
    for sampling in SAMPLINGS:
        expected = sampling.probabilities(target[0])
        torch.testing.assert_close(sampling.probabilities(target.to(device)[0]).cpu(), expected, rtol=1e-4, atol=1e-6)
        counts, logits = torch.zeros(VOCAB), target.to(device)
        for _ in range(num_draws):
            token, drawn_from = sampling.draft(draft[0].to(device), ids, generator)
            verdict = verify(Proposal(token.tolist(), draws=[drawn_from]), logits, sampling, generator)
            counts[int(token) if verdict.accepted else verdict.next_token] += 1
        assert float(counts[expected == 0].sum()) == 0.0
        assert fits(counts.numpy(), expected.numpy()) > 1e-3
