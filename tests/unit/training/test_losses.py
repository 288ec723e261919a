"""The fused loss against closed forms and against autograd on the plain expression."""

import math

import pytest
import torch

from specflow.training.losses import Teacher, ttt_loss
from specflow.training.packing import count_supervised, pack
from tests.unit.drafters.test_eagle3 import make_document

H, HT, D, V = 6, 5, 9, 14


def case(rows=(7, 5), positions=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, H, generator=g, dtype=torch.float64, requires_grad=True) for n in rows]
    where = [torch.randperm(positions, generator=g)[:n].sort().values for n in rows]
    head = torch.randn(D, H, generator=g, dtype=torch.float64, requires_grad=True)
    full = torch.randn(V, HT, generator=g, dtype=torch.float64)
    chosen = torch.randperm(V, generator=g)[:D].sort().values
    states = torch.randn(positions, HT, generator=g, dtype=torch.float64)
    return (
        hidden,
        where,
        head,
        Teacher(states, full[chosen], full, torch.randint(-1, D, (positions,), generator=g)),
        chosen,
    )


def plain(hidden, where, head, teacher, chosen, weights, loss, eta=3.0):
    total = 0.0
    for h, rows, weight in zip(hidden, where, weights, strict=True):
        log_q = (h @ head.t()).log_softmax(-1)
        p = (teacher.states[rows] @ teacher.head.t()).softmax(-1)
        kl = -(p * log_q).sum(-1)
        if loss == "lk_hybrid":
            full = (teacher.states[rows] @ teacher.full_head.t()).softmax(-1)[:, chosen]
            alpha = torch.minimum(full, log_q.exp()).sum(-1)
            w = torch.exp(-eta * alpha.detach())
            kl = w * kl + (1 - w) * (1 - alpha)
        total = total + weight * kl.sum()
    return total


@pytest.mark.parametrize("loss", ["kl", "lk_hybrid"])
@pytest.mark.parametrize("chunk_rows", [3, 8, 100])
def test_value_and_gradients_equal_autograd(loss, chunk_rows):
    hidden, where, head, teacher, chosen = case()
    weights = [0.3, 0.11]
    expected = plain(hidden, where, head, teacher, chosen, weights, loss)
    got, sums = ttt_loss(hidden, where, head, teacher, weights, loss=loss, chunk_rows=chunk_rows)
    # logits are held in fp32 inside, hence the tolerance
    assert math.isclose(got.item(), expected.item(), rel_tol=1e-6)
    inputs = [head, *hidden]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert sums.count.tolist() == [7, 5]
    assert math.isclose((sums.loss * torch.tensor(weights)).sum().item(), expected.item(), rel_tol=1e-6)
    for k in range(2):
        best = (hidden[k] @ head.t()).argmax(-1)
        assert sums.match[k] == (best == teacher.labels[where[k]]).sum()


def test_equal_distributions_cost_the_entropy_and_have_no_gradient():
    g = torch.Generator().manual_seed(1)
    head = torch.randn(D, H, generator=g, requires_grad=True)
    states = torch.randn(4, H, generator=g)
    hidden = states.clone().requires_grad_(True)
    total, _ = ttt_loss([hidden], [torch.arange(4)], head, Teacher(states, head.detach()), [0.25])
    p = (states @ head.t()).softmax(-1)
    assert math.isclose(total.item(), -(p * p.log()).sum(-1).mean().item(), rel_tol=1e-5)
    assert torch.autograd.grad(total, hidden)[0].abs().max() < 1e-6


def test_of_equals_the_first_is_the_choice_as_in_evaluation():
    """A tie is no hit for the token that comes second: bfloat16's logits are often equal at the top."""
    head, states = torch.ones(4, 2), torch.ones(3, 2)
    teacher = Teacher(states, head, labels=torch.tensor([0, 1, -1]))
    _, sums = ttt_loss([states], [torch.arange(3)], head, teacher, [1.0])
    assert sums.match.tolist() == [1.0]


def test_disjoint_distributions_have_the_known_lk_value():
    """Target and draft each certain of another token: alpha 0, weight 1, the loss is the plain cross-entropy."""
    head = torch.eye(4)
    states, hidden = 50 * torch.eye(4)[:1], 50 * torch.eye(4)[1:2]
    total, _ = ttt_loss([hidden], [torch.tensor([0])], head, Teacher(states, head, head), [1.0], loss="lk_hybrid")
    assert math.isclose(total.item(), 50.0, rel_tol=1e-6)


def test_one_hot_teacher_and_uniform_draft_cost_log_of_the_vocabulary():
    head = torch.eye(D)
    total, _ = ttt_loss([torch.zeros(1, D)], [torch.tensor([0])], head, Teacher(200 * torch.eye(D)[:1], head), [1.0])
    assert math.isclose(total.item(), math.log(D), rel_tol=1e-6)


def test_lk_without_the_full_head_is_refused():
    hidden, where, head, teacher, _ = case()
    with pytest.raises(ValueError, match="full head"):
        ttt_loss(hidden, where, head, Teacher(teacher.states, teacher.head), [1, 1], loss="lk_hybrid")


def test_rows_align_with_the_token_they_predict():
    """Row t is supervised at step k iff tokens t + 2 .. t + 2 + k are, in one span; its teacher state is that of token
    t + 1 + k, its label token t + 2 + k."""
    documents = [make_document(10, [(2, 5), (8, 10)], 1), make_document(7, [(0, 3)], 2), make_document(9, [(3, 9)], 3)]
    batch = pack(documents, 3)
    offsets = [0, 10, 17]
    for k in range(3):
        got = set()
        for query, teacher in zip(batch.supervised[k].tolist(), batch.teacher_rows[k].tolist(), strict=True):
            row = int(batch.rows.queries[query])
            d = max(i for i in range(3) if offsets[i] <= row)
            t = row - offsets[d]
            assert batch.labels[teacher] == documents[d].token_ids[t + 2 + k]
            assert torch.equal(batch.teacher_states[teacher], documents[d].final[t + 1 + k])
            assert batch.rows.tokens[k, row] == documents[d].token_ids[t + 1 + k]
            assert batch.rows.positions[row] == t
            got.add((d, t))
        expected = {
            (d, t)
            for d, document in enumerate(documents)
            for t in range(len(document.token_ids))
            if any(a <= t + 2 and t + 2 + k < b for a, b in document.spans)
        }
        assert got == expected
        assert sum(count_supervised(len(d.token_ids), d.spans, 3)[k] for d in documents) == len(expected)


def test_padding_changes_neither_loss_nor_gradient():
    """Neither unsupervised tokens after a document's end nor filler behind the last: same loss, same counts."""
    from specflow.training.packing import Document
    from tests.unit.drafters.test_eagle3 import CONFIG, make_draft

    table = torch.randn(
        CONFIG.vocab_size, CONFIG.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    draft, document = make_draft(), make_document(9, [(3, 9)], 4)

    def padded(x):
        return torch.cat([x, x[:4]])

    longer = Document("x", padded(document.token_ids), padded(document.aux), padded(document.final), document.spans)
    head = torch.randn(CONFIG.draft_vocab_size, CONFIG.target_hidden_size, dtype=torch.float64)
    losses = []
    filled = pack([document], 2, round_to=16)
    assert (len(filled.rows.positions), len(filled.rows.queries), filled.num_tokens) == (32, 16, 9)
    for batch in (pack([document], 2), pack([longer], 2), filled, pack([document], 2, round_to=7)):
        steps = draft.unroll(batch.rows, table)
        hidden = [draft.norm(h[rows]) for h, rows in zip(steps, batch.supervised, strict=True)]
        total, sums = ttt_loss(
            hidden,
            batch.teacher_rows,
            draft.lm_head.weight,
            Teacher(batch.teacher_states, head),
            [1 / len(hidden[0]), 0.8 / len(hidden[1])],
        )
        losses.append((total.item(), sums.count.tolist(), torch.autograd.grad(total, draft.fc.weight)[0]))
    for loss, counts, gradient in losses[1:]:
        assert math.isclose(losses[0][0], loss, rel_tol=1e-7)
        assert losses[0][1] == counts == [6, 5]
        assert torch.allclose(losses[0][2], gradient, atol=1e-6)
