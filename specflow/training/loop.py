"""The training loop, the same for offline and online: only `Features` differs.

Every optimizer step is a function of (seed, step): the data order is planned ahead, losses are divided by the counts of
the whole step, and a checkpoint holds all other state, so a run that was killed and resumed equals one that was not.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from specflow.config import Train
from specflow.device import execution
from specflow.drafters.eagle3 import Eagle3Draft
from specflow.errors import UserError
from specflow.kernels import keep_freed_memory, take_rows
from specflow.paths import Log
from specflow.training.checkpoint import Checkpoints, Progress
from specflow.training.evaluate import Expectation, count_survivors, expectation, target_choices
from specflow.training.features import Features, Row, check_rows
from specflow.training.losses import StepSums, Teacher, ttt_loss
from specflow.training.packing import ROUND_ROWS, Batch, count_supervised, pack, plan_batches
from specflow.training.warmstart import feature_scale, fit_linear

SCALE_TOKENS = 16384
"""Tokens that the scale of the features is estimated on."""


@dataclass
class Trainer:
    """Everything a run needs; `run` drives it. `embedding`, `full_head` [V, target_hidden] are the target's, frozen."""

    stage: str
    draft: Eagle3Draft
    embedding: Tensor
    full_head: Tensor
    features: Features
    config: Train
    checkpoints: Checkpoints
    log: Log
    device: torch.device

    def __post_init__(self) -> None:
        keep_freed_memory()
        c = self.config
        # by id, so that the order of training does not depend on where the states come from
        self.train_rows, self.eval_rows = (
            sorted(self.features.rows(split), key=lambda row: row.id) for split in ("train", "eval")
        )
        check_rows(self.train_rows, "train")
        check_rows(self.eval_rows, "eval")
        self.plan = plan_steps(self.train_rows, c)
        self.execution = execution(self.device)
        self.full_head = self.full_head.to(self.device, self.execution.training_dtype)
        self.teacher_head = self.full_head[self.draft.t2d.to(self.device)]
        self.embedding = self.embedding.to(self.device, self.execution.training_dtype)
        self.draft = self.draft.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.draft.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True
        )
        self.unroll = torch.compile(self.draft.unroll, dynamic=True) if c.compile else self.draft.unroll
        self._draft_ids = torch.full((self.draft.config.vocab_size,), -1, dtype=torch.int64, device=self.device)
        self._draft_ids[self.draft.t2d] = torch.arange(self.draft.config.draft_vocab_size, device=self.device)
        self._choices: dict[int, Tensor] = {}
        self.feature_scale = torch.ones(self.draft.fc.in_features)
        # A norm before fc takes care of scale itself, and would not commute with ours.
        normed = self.draft.config.norm_before_fc or self.draft.config.fc_norm
        if self.plan and not normed:
            self.feature_scale = feature_scale(self._sample(SCALE_TOKENS))
        with torch.no_grad():  # the same function of the unscaled features
            self.draft.fc.weight.mul_(self.feature_scale.to(self.device))

    def run(self) -> Progress:
        """Train to the end of the plan, from the last checkpoint if there is one; the draft ends with its best
        weights.
        """
        progress = self.checkpoints.load(self.draft, self.optimizer)
        if progress.step == 0 and self.config.fit_tokens and self.config.init_from is None:
            batches = self._sample(self.config.fit_tokens)
            progress.fit_r2 = fit_linear(
                self.draft, tqdm(batches, desc=f"{self.stage}: fit", unit="batch"), self.embedding
            )
        evals, saves = (
            _spread(len(self.plan), self.config.evals),
            _spread(len(self.plan), self.config.checkpoints),
        )
        total = sum(row.length for row in self.train_rows) * self.config.epochs
        done = sum(self.train_rows[i].length for group in self.plan[: progress.step] for batch in group for i in batch)
        with (
            _interruptible() as stop,
            tqdm(total=total, initial=done, desc=self.stage, unit="tok", unit_scale=True) as bar,
        ):
            for group in self._batches(progress.step):
                began = time.perf_counter()
                values = self.step(group, progress.step)
                progress.seconds += time.perf_counter() - began
                progress.step += 1
                progress.curves["training"].append({"step": progress.step, **values})
                self.log({f"train/{name}": value for name, value in values.items()}, progress.step)
                bar.update(sum(batch.num_tokens for batch in group))
                bar.set_postfix(loss=f"{values['loss']:.3f}", al=f"{progress.best_acceptance_length:.2f}")
                if progress.step in evals:
                    self._note_eval(progress)
                if progress.step in saves or stop.signal is not None:
                    self.checkpoints.save(progress, self.draft, self.optimizer)
                if stop.signal is not None:
                    raise SystemExit(128 + stop.signal)
        if not self.plan:  # epochs: 0, an earlier draft as it is
            self._note_eval(progress)
        self.draft.load_state_dict(progress.best_weights)
        with torch.no_grad():
            self.draft.fc.weight.div_(self.feature_scale.to(self.device))
        return progress

    def _sample(self, num_tokens: int) -> Iterator[Batch]:
        """Batches of the first epoch's order, up to about `num_tokens` tokens."""
        seen = 0
        for members in (batch for group in self.plan for batch in group):
            if seen >= num_tokens:
                return
            batch = self._load([self.train_rows[i] for i in members])
            seen += batch.num_tokens
            yield batch

    def step(self, group: list[Batch], step: int) -> dict[str, float]:
        """One optimizer step over the micro-batches of `group`, as `_load` gives them; returns its loss, per-step
        losses and matches, lr, norm.
        """
        c = self.config
        counts = [sum(len(batch.supervised[k]) for batch in group) for k in range(c.ttt_steps)]
        weights = [c.ttt_decay**k / max(count, 1) for k, count in enumerate(counts)]
        lr = learning_rate(step, len(self.plan), c)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        sums = [self._backward(batch, weights) for batch in group]
        norm = self._clip()
        if not math.isfinite(norm):
            raise UserError(f"{self.stage}: gradient norm is {norm} at step {step}: lower train.lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = [sum(s.loss[k].item() for s in sums) / max(count, 1) for k, count in enumerate(counts)]
        match = [sum(s.match[k].item() for s in sums) / max(count, 1) for k, count in enumerate(counts)]
        return {
            "loss": sum(c.ttt_decay**k * value for k, value in enumerate(loss)),
            **{f"loss_{k}": value for k, value in enumerate(loss)},
            **{f"match_{k}": value for k, value in enumerate(match)},
            "lr": lr,
            "grad_norm": norm,
        }

    def _clip(self) -> float:
        """Scale gradients to `clip_grad_norm` where they are longer; return how long they were."""
        parameters = list(self.draft.parameters())
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        length = norm.item()
        if length > self.config.clip_grad_norm:  # a pass over all gradients
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, norm)
        return length

    def _backward(self, batch: Batch, weights: list[float]) -> StepSums:
        with self.execution.autocast(self.device):
            steps = self.unroll(batch.rows, self.embedding)
            normed = [
                self.draft.head_input(take_rows(hidden, rows))
                for hidden, rows in zip(steps, batch.supervised, strict=True)
            ]
            normed = [x.to(self.teacher_head.dtype) for x in normed]
        teacher = Teacher(
            states=batch.teacher_states,
            head=self.teacher_head,
            full_head=self.full_head if self.config.loss == "lk_hybrid" else None,
            labels=self._draft_ids[batch.labels],
        )
        total, sums = ttt_loss(
            normed, batch.teacher_rows, self.draft.lm_head.weight, teacher, weights, loss=self.config.loss
        )
        if not torch.isfinite(total):
            rows = ", ".join(batch.ids[:8]) + (" ..." if len(batch.ids) > 8 else "")
            raise UserError(
                f"{self.stage}: loss is {total.item()} on rows {rows}: lower train.lr, or run the extract stage again"
            )
        total.backward()
        return sums

    def evaluate(self) -> Expectation:
        """Expected acceptance on the eval split with the present weights."""
        self.draft.eval()
        counts = []
        lengths = [row.length for row in self.eval_rows]
        for number, members in enumerate(plan_batches(lengths, self.config.batch_tokens, seed=0, epoch=0)):
            batch = self._load([self.eval_rows[i] for i in members])
            if number not in self._choices:
                self._choices[number] = target_choices(batch, self.full_head)
            with self.execution.autocast(self.device):
                counts.append(count_survivors(self.draft, batch, self._choices[number], self.embedding))
        self.draft.train()
        return expectation(counts)

    def _note_eval(self, progress: Progress) -> None:
        result = self.evaluate()
        values = {"expected_acceptance_length": result.acceptance_length}
        values |= {f"survival_{k + 1}": value for k, value in enumerate(result.survival)}
        progress.curves["eval"].append({"step": progress.step, **values})
        self.log({f"eval/{name}": value for name, value in values.items()}, progress.step)
        if result.acceptance_length > progress.best_acceptance_length:
            progress.best_acceptance_length, progress.best_step = result.acceptance_length, progress.step
            progress.best_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.draft.state_dict().items()
            }

    def _load(self, rows: list[Row]) -> Batch:
        """A batch of these rows on the device, its states in the dtype of training and its features scaled."""
        batch = pack(self.features.documents(rows), self.config.ttt_steps, ROUND_ROWS).to(self.device)
        dtype = self.execution.training_dtype
        aux = (batch.rows.aux.float() / self.feature_scale.to(self.device)).to(dtype)
        return replace(batch, rows=replace(batch.rows, aux=aux), teacher_states=batch.teacher_states.to(dtype))

    def _batches(self, first: int) -> Iterator[list[Batch]]:
        """Batches of the steps from `first` on, each loaded when it is asked for, or while the one before trains."""

        def load(step: int) -> list[Batch]:
            return [self._load([self.train_rows[i] for i in members]) for members in self.plan[step]]

        steps = range(first, len(self.plan))
        if not self.execution.loads_ahead:
            yield from map(load, steps)
            return
        with ThreadPoolExecutor(1) as loader:
            pending = loader.submit(load, first) if steps else None
            for step in steps:
                assert pending is not None
                group = pending.result()
                pending = loader.submit(load, step + 1) if step + 1 < len(self.plan) else None
                yield group


def plan_steps(rows: list[Row], config: Train) -> list[list[list[int]]]:
    """All optimizer steps of a run: lists of micro-batches of row numbers. Rows that no step supervises are left
    out.
    """
    useful = [i for i, row in enumerate(rows) if sum(count_supervised(row.length, row.spans, config.ttt_steps))]
    lengths = [rows[i].length for i in useful]
    steps = []
    for epoch in range(config.epochs):
        batches = [
            [useful[i] for i in b] for b in plan_batches(lengths, config.batch_tokens, seed=config.seed, epoch=epoch)
        ]
        steps += [batches[i : i + config.accumulate] for i in range(0, len(batches), config.accumulate)]
    return steps


def learning_rate(step: int, num_steps: int, config: Train) -> float:
    """Linear warm-up over warmup_ratio of the steps, then cosine to min_lr_ratio * lr at the last one."""
    warmup = max(1, round(config.warmup_ratio * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - 1 - warmup)
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    )


def _spread(num_steps: int, times: int) -> set[int]:
    """`times` step numbers spread evenly over 1..num_steps, the last one included."""
    return {math.ceil(num_steps * (i + 1) / times) for i in range(times)}


@dataclass
class _Stop:
    signal: int | None = None


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads after the step under way."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: a flow runner handles signals itself
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
