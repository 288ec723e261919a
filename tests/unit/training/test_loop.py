"""The loop on a tiny target: planning, resume, expected acceptance, offline against online, bad states."""

import os
import signal

import pytest
import torch

from specflow.config import Train
from specflow.drafters.eagle3 import Eagle3Draft
from specflow.errors import UserError
from specflow.training.checkpoint import Checkpoints
from specflow.training.evaluate import count_survivors, expectation, target_choices
from specflow.training.loop import Trainer, learning_rate, plan_steps
from specflow.training.packing import Document, pack, plan_batches
from tests.unit.drafters.test_eagle3 import CONFIG, make_document, make_draft

TABLE = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, generator=torch.Generator().manual_seed(9))
HEAD = torch.randn(CONFIG.vocab_size, CONFIG.target_hidden_size, generator=torch.Generator().manual_seed(8))


class Memory:
    """Features held in memory: what StoredFeatures and LiveFeatures give, without a target."""

    def __init__(self, train: list[Document], evals: list[Document]) -> None:
        self.splits = {"train": train, "eval": evals}

    def rows(self, split):
        return [_Row(d) for d in self.splits[split]]

    def documents(self, rows):
        return [row.document for row in rows]


class _Row:
    def __init__(self, document: Document) -> None:
        self.id, self.length, self.spans, self.document = document.id, len(document.token_ids), document.spans, document


def documents(count: int, seed: int) -> list[Document]:
    return [make_document(8 + (seed + i) % 7, [(3, 8)], seed + i, torch.float32) for i in range(count)]


def make_trainer(folder, *, key="k", log=lambda values, step: None, **changes) -> Trainer:
    settings = {
        "ttt_steps": 3,
        "epochs": 3,
        "batch_tokens": 30,
        "accumulate": 2,
        "lr": 1e-2,
        "evals": 3,
        "checkpoints": 2,
        "fit_tokens": 0,  # the toy draft is wider than its target
    }
    return Trainer(
        stage="train_offline",
        draft=make_draft(dtype=torch.float32),
        embedding=TABLE,
        full_head=HEAD,
        features=Memory(documents(14, 100), documents(4, 500)),
        config=Train(**settings | changes),
        checkpoints=Checkpoints(folder / key),
        log=log,
        device=torch.device("cpu"),
    )


def weights(draft: Eagle3Draft) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tmp_path, number):
    whole = make_trainer(tmp_path / "a")
    expected = whole.run()
    seen = []

    def interrupt(values, step):
        seen.append(step)
        if step == 4:
            os.kill(os.getpid(), number)

    cut = make_trainer(tmp_path / "b", log=interrupt)
    with pytest.raises(SystemExit) as stopped:
        cut.run()
    assert stopped.value.code == 128 + number
    assert max(seen) == 4
    resumed = make_trainer(tmp_path / "b")
    got = resumed.run()
    assert got.step == expected.step == len(whole.plan)
    assert got.curves == expected.curves
    for name, tensor in weights(whole.draft).items():
        assert torch.equal(tensor, weights(resumed.draft)[name]), name
    old, new = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(old[i]["exp_avg_sq"], new[i]["exp_avg_sq"]) for i in old)


def test_accumulation_equals_one_large_batch(tmp_path):
    """Two micro-batches of an optimizer step give the update of the same documents in one."""
    small = make_trainer(tmp_path / "a", batch_tokens=30, accumulate=2)
    large = make_trainer(tmp_path / "b", batch_tokens=60, accumulate=1)
    members = [[0, 1], [2, 3]]
    rows = small.train_rows
    first = small.step([small._load([rows[i] for i in m]) for m in members], 0)
    second = large.step([large._load([rows[i] for m in members for i in m])], 0)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    for a, b in zip(small.draft.parameters(), large.draft.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_overfitting_a_few_documents_reaches_certainty(tmp_path):
    """Loss falls to the teacher's entropy and every chain survives: acceptance length 1 + ttt_steps on the same
    rows.
    """
    trainer = make_trainer(tmp_path, epochs=300, batch_tokens=256, accumulate=1, lr=1e-2, evals=1)
    choices = _teach_greedy(trainer)
    trainer.run()
    batch = trainer._load(trainer.train_rows)
    result = expectation([count_survivors(trainer.draft, batch, choices, TABLE)])
    assert result.acceptance_length > 3.6


def _teach_greedy(trainer: Trainer) -> torch.Tensor:
    """Make the target certain (large states) of tokens inside the draft vocabulary."""
    trainer.full_head = trainer.full_head * 5
    trainer.full_head[~trainer.draft.t2d] = 0
    trainer.teacher_head = trainer.full_head[trainer.draft.t2d]
    return target_choices(trainer._load(trainer.train_rows), trainer.full_head)


def test_survival_counts_by_hand():
    """Rows 0..3 of one answer are trained on; row 0 predicts its first token, which a server has from the prompt, so
    that chains start at rows 1..3: matches 101 at step 0, 1 of the 2 that go on at step 1.
    """

    class Fixed:
        d2t = torch.zeros(10, dtype=torch.int64)

        def unroll(self, rows, embedding):
            return [torch.eye(10)[[1, 2, 9, 4]], torch.eye(10)[[2, 3, 4, 0]]]

        def logits(self, hidden):
            return hidden

    document = Document("x", torch.tensor([0, 0, 1, 2, 3, 4]), torch.zeros(6, 3), torch.zeros(6, 2), [(2, 6)])
    batch = pack([document], 2)
    assert [rows.tolist() for rows in batch.supervised] == [[0, 1, 2, 3], [0, 1, 2]]
    counts = count_survivors(Fixed(), batch, batch.labels, TABLE)
    assert batch.served.tolist() == [False, True, True, True]
    assert [c.tolist() for c in counts] == [[2, 1], [3, 2]]
    assert expectation([counts, counts]).acceptance_length == pytest.approx(1 + 2 / 3 + 1 / 2)


@pytest.mark.parametrize("spans", [[(0, 5)], [(1, 4), (6, 9)], [(3, 4)], [(2, 5), (5, 9)], [(0, 1), (4, 9)]])
def test_chains_start_behind_an_answers_first_token(spans):
    """Row t starts one if a token before the one that it predicts, t + 2, is of the same answer."""
    document = make_document(9, spans, 1, torch.float32)
    batch = pack([document], 3, round_to=8)
    got = batch.rows.queries[batch.served].tolist()
    assert got == [t for t in range(7) if any(a < t + 2 < b for a, b in spans)]


def test_every_document_is_seen_once_an_epoch_within_the_token_bound():
    lengths = torch.randint(5, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for epoch in range(2):
        batches = plan_batches(lengths, 100, seed=1, epoch=epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        assert all(sum(lengths[i] for i in batch) <= 100 for batch in batches)
        assert sum(lengths) / (100 * len(batches)) > 0.9  # little room is wasted
    assert plan_batches(lengths, 100, seed=1, epoch=0) != plan_batches(lengths, 100, seed=1, epoch=1)
    assert plan_batches([150, 20], 100, seed=0, epoch=0) in ([[0], [1]], [[1], [0]])  # a long one gets its own batch


def test_rows_that_no_step_supervises_are_not_planned():
    rows = [_Row(make_document(9, [(0, 1)], 1)), _Row(make_document(9, [(3, 9)], 2))]
    assert plan_steps(rows, Train(ttt_steps=3, epochs=1)) == [[[1]]]


def test_learning_rate_warms_up_and_ends_at_its_floor():
    config = Train(lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[99] == pytest.approx(0.2)
    middle = 10 + 89 / 2
    assert (rates[int(middle)] + rates[int(middle) + 1]) / 2 == pytest.approx(1.1, abs=0.02)


def test_states_that_are_not_finite_end_in_one_line(tmp_path):
    trainer = make_trainer(tmp_path)
    bad = trainer.train_rows[0]
    bad.document.aux[5, 1] = float("nan")
    with pytest.raises(UserError, match=rf"train_offline: loss is nan on rows .*\b{bad.id}\b.*: lower"):
        trainer.run()


def test_an_empty_split_is_one_line(tmp_path):
    with pytest.raises(UserError, match="eval split has no supervised row"):
        Trainer(
            "train_online", make_draft(dtype=torch.float32), TABLE, HEAD, Memory(documents(2, 0), []), Train(),
            Checkpoints(tmp_path / "k"), lambda values, step: None, torch.device("cpu"),
        )  # fmt: skip
