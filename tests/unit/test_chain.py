"""Chain drafting: alignment of rows, forgetting of speculative rows, honest probabilities."""

import torch

from specflow.decoding.chain import ChainDrafter
from specflow.drafters.eagle3 import DraftCache, Eagle3Config, Eagle3Draft

V, D, H = 40, 16, 32


def make_draft(seed: int = 0) -> Eagle3Draft:
    torch.manual_seed(seed)
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=H,
            target_hidden_size=H,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            vocab_size=V,
            draft_vocab_size=D,
            aux_layer_ids=[0, 1, 2],
        )
    )
    chosen = torch.randperm(V)[:D].sort().values
    draft.d2t.copy_(chosen - torch.arange(D))
    draft.t2d[chosen] = True
    return draft.eval().requires_grad_(False)


def reference(
    draft: Eagle3Draft, table: torch.Tensor, history: list[int], aux: torch.Tensor, num_tokens: int
) -> list[int]:
    """Greedy chain from scratch: row t reads aux_t and the token at t + 1, for every t before the last token."""
    cache = DraftCache(draft.config, 128, torch.float32)
    hidden = draft.decode(table[torch.tensor(history[1:])], draft.project(aux), cache)[-1:]
    tokens: list[int] = []
    for k in range(num_tokens):
        if k:
            hidden = draft.decode(table[torch.tensor(tokens[-1:])], hidden, cache)
        draft_id = int(draft.logits(hidden).argmax())
        tokens.append(draft_id + int(draft.d2t[draft_id]))
    return tokens


def test_incremental_chain_equals_one_from_scratch() -> None:
    """Growing by several tokens at a time, speculative rows forgotten in between."""
    draft, table = make_draft(), torch.randn(V, H)
    history = torch.randint(0, V, (30,)).tolist()
    aux = torch.randn(29, 3 * H)
    chain = ChainDrafter(make_draft(), table, 128)
    known = 7
    chain.start(history[: known + 1], aux[:known])
    new = aux[known - 1 : known]
    for grow in [1, 4, 2, 3, 1, 4]:
        proposal = chain.propose(history[: known + 1], new, 4, 0.0, None)
        assert proposal.token_ids == reference(draft, table, history[: known + 1], aux[:known], 4)
        assert all(draft.t2d[token] for token in proposal.token_ids)
        new, known = aux[known : known + grow], known + grow


def test_start_forgets_the_previous_sequence() -> None:
    chain = ChainDrafter(make_draft(), torch.randn(V, H), 128)
    history, aux = torch.randint(0, V, (12,)).tolist(), torch.randn(11, 3 * H)
    proposals = []
    for _ in range(2):
        chain.start(history, aux)
        proposals.append(chain.propose(history, aux[-1:], 3, 0.0, None).token_ids)
    assert proposals[0] == proposals[1]


def test_sampled_tokens_come_from_the_probabilities_handed_over() -> None:
    table = torch.randn(V, H)
    chain = ChainDrafter(make_draft(), table, 128)
    history, aux = torch.randint(0, V, (12,)).tolist(), torch.randn(11, 3 * H)
    generator = torch.Generator().manual_seed(1)
    chain.start(history, aux)
    counts, num = torch.zeros(V), 3000
    for _ in range(num):
        chain._verified = chain._cache.length = 10
        proposal = chain.propose(history, aux[-1:], 1, 0.7, generator)
        counts[proposal.token_ids[0]] += 1
    expected = proposal.probs(0, V)
    assert abs(float(expected.sum()) - 1) < 1e-5
    assert float((counts / num - expected).abs().max()) < 0.04
    assert float(expected[~make_draft().t2d].sum()) == 0.0
