"""The training loop on a device: its losses against the CPU's in float32, killed and resumed, evaluation while a thread
captures states of the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specflow.config import Extract, Train
from specflow.device import CPU, executing, execution
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.extract.capture import StateCapture
from specflow.training.checkpoint import Checkpoints, Progress
from specflow.training.features import Features, LiveFeatures
from specflow.training.loop import Trainer
from specflow.training.packing import Document
from tests.decoding import make_llama

LAYERS = [1, 2, 3]


@dataclass(frozen=True)
class Shape:
    """Of target and draft, and of a run. Heads as flex attention's kernels want them."""

    hidden: int = 64
    vocab: int = 96
    draft_vocab: int = 64
    num_train: int = 6
    longest: int = 40
    ttt_steps: int = 2
    batch_tokens: int = 64


@dataclass
class Row:
    id: str
    length: int
    spans: list[tuple[int, int]]
    document: Document


class Held:
    """Features in memory, by split."""

    def __init__(self, **splits: list[Document]) -> None:
        self.splits = splits

    def rows(self, split: str) -> Sequence[Row]:
        return [Row(d.id, len(d.token_ids), d.spans, d) for d in self.splits[split]]

    def documents(self, rows: Sequence[Any]) -> list[Document]:
        return [row.document for row in rows]


def make_draft(shape: Shape) -> Eagle3Draft:
    torch.manual_seed(0)
    config = Eagle3Config(
        hidden_size=shape.hidden,
        target_hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        vocab_size=shape.vocab,
        draft_vocab_size=shape.draft_vocab,
        aux_layer_ids=LAYERS,
    )
    draft = Eagle3Draft(config)
    chosen = torch.randperm(shape.vocab)[: shape.draft_vocab].sort().values
    draft.d2t.copy_(chosen - torch.arange(len(chosen)))
    draft.t2d[chosen] = True
    return draft


def make_target(shape: Shape) -> Any:
    return make_llama(shape.vocab, hidden_size=shape.hidden, num_layers=4)


def make_samples(shape: Shape) -> dict[str, list[dict[str, Any]]]:
    g = torch.Generator().manual_seed(1)

    def row(name: str, split: str) -> dict[str, Any]:
        length = int(torch.randint(shape.longest // 2, shape.longest, (), generator=g))
        ids = torch.randint(shape.vocab, (length,), generator=g).tolist()
        return {"id": f"{split}{name}", "category": "x", "token_ids": ids, "spans": [[4, 12], [15, length]]}

    train = [row(str(i), "train") for i in range(shape.num_train)]
    # evaluated on what was trained on, so that a few steps show
    return {"train": train, "eval": [{**made, "id": made["id"].replace("train", "eval")} for made in train]}


def live(shape: Shape, device: torch.device, dtype: torch.dtype) -> LiveFeatures:
    return LiveFeatures(make_target(shape).to(device, dtype), make_samples(shape), Extract(batch_tokens=64), LAYERS)


def held(features: Features) -> Held:
    """What `features` gives, taken once and one document at a time, on the CPU."""

    def taken(split: str) -> list[Document]:
        documents = [features.documents([row])[0] for row in features.rows(split)]
        return [Document(d.id, d.token_ids, d.aux.cpu(), d.final.cpu(), d.spans) for d in documents]

    return Held(train=taken("train"), eval=taken("eval"))


Log = Callable[[dict[str, float], int], None]


def make_trainer(
    folder: Path,
    features: Features,
    device: torch.device,
    shape: Shape,
    log: Log = lambda values, step: None,
    **changes: Any,
) -> Trainer:
    """Evaluates after each step."""
    target = make_target(shape)
    settings = {"ttt_steps": shape.ttt_steps, "batch_tokens": shape.batch_tokens, "epochs": 2, "fit_tokens": 0}
    settings |= {"lr": 1e-2, "evals": 100}
    return Trainer(
        stage="train_offline",
        draft=make_draft(shape),
        embedding=target.get_input_embeddings().weight.detach(),
        full_head=target.get_output_embeddings().weight.detach(),
        features=features,
        config=Train(**settings | changes),
        checkpoints=Checkpoints(folder),
        log=log,
        device=device,
    )


def curve(progress: Progress, of: str, name: str) -> Tensor:
    return torch.tensor([point[name] for point in progress.curves[of]])


def check_offline(folder: Path, device: torch.device, shape: Shape, **changes: Any) -> None:
    """Loss of each step within 1 % of float32's on a CPU, expected acceptance length after each within 0.1."""
    with executing(CPU):
        features = held(live(shape, torch.device("cpu"), torch.float32))
        exact = make_trainer(folder / "cpu", features, torch.device("cpu"), shape, **changes).run()
    trainer = make_trainer(folder / "device", features, device, shape, **changes)
    got = trainer.run()
    dtype = execution(device).training_dtype
    assert {trainer.full_head.dtype, trainer.teacher_head.dtype, trainer.embedding.dtype} == {dtype}
    assert {weight.dtype for weight in trainer.draft.parameters()} == {torch.float32}
    losses = [curve(progress, "training", "loss") for progress in (exact, got)]
    assert len(losses[0]) == len(losses[1]) > 5 and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0.0)
    lengths = [curve(progress, "eval", "expected_acceptance_length") for progress in (exact, got)]
    assert len(lengths[1]) == len(losses[1]) and lengths[0][-1] > lengths[0][0] + 0.1
    torch.testing.assert_close(lengths[1], lengths[0], rtol=0.0, atol=0.1)


def check_online(folder: Path, device: torch.device, shape: Shape, dtype: torch.dtype, tolerance: float) -> None:
    """Online against offline over the states of the same target in the same dtype, whose rows were captured one by
    one: the loading thread captures while the loop evaluates, and each batch has its own states.
    """
    offline = make_trainer(folder / "offline", held(live(shape, device, dtype)), device, shape).run()
    online = make_trainer(folder / "online", live(shape, device, dtype), device, shape).run()
    for name in ("loss", "loss_0"):
        losses = [curve(progress, "training", name) for progress in (offline, online)]
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0.0)


class Killed(Exception):
    pass


def check_resume(folder: Path, device: torch.device, shape: Shape, tolerance: float) -> None:
    """A run that ended at its fifth step and went on equals one that did not: losses and weights, within `tolerance`
    (0: bit for bit).
    """
    features = held(live(shape, device, torch.float32))

    def end(values: dict[str, float], step: int) -> None:
        if step == 5 and "train/loss" in values:
            raise Killed

    whole = make_trainer(folder / "whole", features, device, shape, checkpoints=100, evals=2)
    expected = whole.run()
    try:
        make_trainer(folder / "cut", features, device, shape, log=end, checkpoints=100, evals=2).run()
    except Killed:
        resumed = make_trainer(folder / "cut", features, device, shape, checkpoints=100, evals=2)
        progress = resumed.checkpoints.load(resumed.draft, resumed.optimizer)
        assert progress.step == 4
        got = resumed.run()
    losses = [curve(progress, "training", "loss") for progress in (expected, got)]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0.0)
    for name, weight in whole.draft.state_dict().items():
        torch.testing.assert_close(resumed.draft.state_dict()[name], weight, rtol=0.0, atol=tolerance)


def check_capture(device: torch.device, shape: Shape, dtype: torch.dtype, tolerance: float) -> None:
    """States of ragged rows in one forward against transformers' float32 forward on the CPU of each alone."""
    rows = [row["token_ids"] for row in make_samples(shape)["train"]]
    exact = make_target(shape)
    with executing(CPU), torch.inference_mode():
        alone = [exact.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
    with StateCapture(make_target(shape).to(device, dtype), LAYERS, dtype) as capture:
        token_ids, aux, final, finite = capture(rows)
    assert (aux.dtype, final.dtype) == (dtype, dtype) and bool(finite.all())
    assert token_ids.tolist() == [token for row in rows for token in row]
    expected = torch.cat([torch.cat([hidden[k][0] for k in LAYERS], -1) for hidden in alone])
    last = torch.cat([hidden[-1][0] for hidden in alone])
    for got, wanted in ((aux, expected), (final, last)):
        assert float((got.cpu().float() - wanted).norm() / wanted.norm()) < tolerance


def check_threads_capture_their_own(device: torch.device, shape: Shape, num_captures: int = 80) -> None:
    """Two threads on one capture, each batch compared with its own states taken before."""
    features = live(shape, device, torch.float32)
    rows = list(features.rows("train"))
    pairs = [[rows[i], rows[(i + 1) % len(rows)]] for i in range(len(rows))]
    expected = [[d.final for d in features.documents(pair)] for pair in pairs]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(features.documents, [pairs[i % len(pairs)] for i in range(num_captures)]))
    for i, documents in enumerate(found):
        for document, final in zip(documents, expected[i % len(pairs)], strict=True):
            torch.testing.assert_close(document.final, final, rtol=1e-4, atol=1e-4)
