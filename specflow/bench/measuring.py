"""Measures a job: its inputs checked, engines built on one model, records made or taken up from a log, a summary.

Shares (`shares.py`) divide the questions; what is measured once for all of them (`Work.measure_first`) comes before.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from specflow import files
from specflow.bench import batched
from specflow.bench.costs import measure_costs
from specflow.bench.identity import identity
from specflow.bench.job import Job, differences
from specflow.bench.questions import Sets, cache_length, largest_depth, load_questions, prompt_tokens
from specflow.bench.runner import Engine, Runner, sampling_of, sweep
from specflow.bench.scoring.accuracy import accuracy, check_scorable
from specflow.bench.statistics.drift import machine_load, most_at_once
from specflow.bench.statistics.records import Record
from specflow.bench.statistics.summary import summary_of
from specflow.bench.stock import over_stock, stock_prompts, time_stock_generate
from specflow.config_bench import Bench, DynamicTree
from specflow.data.prompt_sets import Question
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Drafter
from specflow.decoding.independent import IndependentDrafter, check_assistant, load_assistant
from specflow.decoding.known import KnownAnswerDrafter
from specflow.decoding.lookup import LookupDrafter
from specflow.decoding.tree import TreeDrafter, check_width
from specflow.device import default_device, device_for_loading, release_memory
from specflow.drafters.inference import decoding_dtype, place
from specflow.errors import UserError
from specflow.export.eagle3 import check_export, load_export
from specflow.export.imports import read_draft
from specflow.results.files import Part
from specflow.results.schema import BatchRow, Conditions, Identity, Settings, StepCosts, Summary, SweepPoint
from specflow.resume import State, code_digest, versions
from specflow.sharding.shares import MERGE, WHOLE, Share, only_key, open_log, open_state
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specflow.drafters.eagle3 import Eagle3Draft


logger = logging.getLogger("specflow")
P = TypeVar("P", bound=Part)
MACHINE = "machine.json"
"""Beside the logs of a job that must not go on elsewhere: what they were measured on."""


@dataclass
class Inputs:
    """What a job names, read and checked: whatever does not fit ends it here, before anything slow."""

    job: Job
    tokenizer: PreTrainedTokenizerBase
    draft: Eagle3Draft | None
    notes: list[str]
    """What was assumed of a foreign draft."""
    sets: Sets
    tuning: list[Question]
    max_length: int

    @classmethod
    def load(cls, job: Job) -> Inputs:
        tokenizer = load_tokenizer(job.target, job.cache)
        sets, tuning = load_questions(job)
        bench = job.bench
        check_scorable(sets, bench.accuracy, execute_code=bench.execute_code)
        max_length = cache_length(tokenizer, {**sets, "sweep": tuning}, bench, job.target.max_position_embeddings)
        draft, notes = _load_draft(job)
        if draft is not None and bench.tree is not None:
            check_width(bench.tree, draft.config.draft_vocab_size)
        if job.assistant is not None:
            check_assistant(job.assistant, tokenizer, job.target.vocab_size)
        return cls(job, tokenizer, draft, notes, sets, tuning, max_length)

    @property
    def settings(self) -> Settings:
        bench = self.job.bench
        return Settings(
            **{name: getattr(bench, name) for name in Bench.model_fields if name != "serve"},
            mode=self.job.mode,
            questions={key: [q.question_id for q in value] for key, value in self.sets.items()},
            sweep_questions=[q.question_id for q in self.tuning],
        )

    @property
    def parts(self) -> dict[str, Any]:
        """All that the records depend on, the machine left out, as `State` takes it."""
        asked = [[q.question_id, q.turns] for questions in [*self.sets.values(), self.tuning] for q in questions]
        drafts = {name: self.job.digests.get(name) for name in ("draft", "assistant")}
        return {
            "code": code_digest(self.job.root, "bench"),
            "versions": versions(),
            "target": self.job.target.identity,
            "inputs": {**drafts, "questions": files.sha256_json(asked)},
            "settings": self.settings.model_dump(mode="json"),
        }


def _load_draft(job: Job) -> tuple[Eagle3Draft | None, list[str]]:
    if job.draft is None or not job.has_draft:
        return None, []
    if job.foreign:
        return read_draft(job.draft, job.target, job.cache)
    check_export(job.draft, job.target)
    draft, context = load_export(job.draft), job.target.max_position_embeddings
    longest = draft.config.max_position_embeddings
    if longest >= context:
        return draft, []
    note = f"the draft was made for {longest} positions, the target for {context}: what is longer is drafted badly"
    logger.warning("bench: %s", note)
    return draft, [note]


@dataclass
class Work:
    """A job on this machine, and what of it is done."""

    inputs: Inputs
    device: torch.device
    about: Identity
    state: State
    log: files.RowLog

    @classmethod
    def open(cls, stack: ExitStack, job: Job, share: Share = WHOLE) -> Work:
        """`stack` holds the resume state."""
        inputs = Inputs.load(job)
        device = default_device()
        about = identity(job.target, job.draft if job.has_draft else None, job.root, device)
        if inputs.draft is not None:
            about = about.changed(draft_dtype=str(_draft_dtype(job, device)).removeprefix("torch."))
        machine = about.model_dump(mode="json", include={"versions", "cpu", "device", "torch_threads"})
        if job.on_other_machine == "refuse" and share != MERGE:
            _check_machine(job.state / MACHINE, machine)
        state = stack.enter_context(open_state(job.state / "bench", f"bench@{job.name}", inputs.parts, share))
        key = files.sha256_json(machine)  # times of different machines are not mixed
        if share == MERGE:
            key = only_key(state.folder, "bench")
        log = open_log(state.folder, "bench", key, share)
        stack.callback(log.close)
        if log.discarded:
            logger.info("bench@%s starts anew: it was interrupted on another machine or number of threads", job.name)
        if share.count > 1:
            log.append({"id": "identity", **about.to_json()})
        elif share == MERGE:  # the machine that measured, not the one that puts the records together
            about = _from_row(Identity, log.rows["identity"])
        return cls(inputs, device, about, state, log)

    @property
    def job(self) -> Job:
        return self.inputs.job

    def measure_first(self) -> None:
        """What the machine does besides, stock generate(), the sweep over K, costs and batches, unless a log has
        them.
        """
        if "load" not in self.log.rows:
            self.log.append({"id": "load", **machine_load()})
        for row, measure in (
            ("stock", self._measure_stock),
            ("sweep", self._measure_sweep),
            ("costs", self._measure_costs),
            ("batch", self._measure_batches),
        ):
            if row in self._needed and row not in self.log.rows:
                self.log.append({"id": row, **measure()})

    @property
    def _needed(self) -> set[str]:
        """What is measured once."""
        bench, eagle3 = self.job.bench, self.inputs.draft is not None
        needed = {
            "stock": bench.stock_generate and self.job.mode != "draft",
            "sweep": bench.sweeps and self.job.has_draft,
            "costs": bool(bench.cost_tokens) and eagle3 and self.job.mode == "both",
            "batch": bool(bench.batch_sizes) and eagle3 and self.job.mode == "both",
        }
        return {row for row, said in needed.items() if said}

    def check_first(self) -> None:
        """Raise UserError unless the logs hold what is measured once: shares must not choose a K each."""
        MERGE.check_nothing_left("bench", sum(row not in self.log.rows for row in self._needed))

    @property
    def num_speculative_tokens(self) -> int:
        """K of the chain, or the tree's depth. A resumed run keeps the choice it had made."""
        bench = self.job.bench
        if not self.job.has_draft:
            return 0
        if not bench.sweeps:
            return largest_depth(bench)
        return max(self._sweep_points, key=lambda point: point.tok_s).num_speculative_tokens

    @property
    def _sweep_points(self) -> list[SweepPoint]:
        return [SweepPoint.model_validate(row) for row in self.log.rows["sweep"]["rows"]]

    def records(self, share: Share = WHOLE) -> tuple[list[Record], Runner]:
        """Every record of the share, and the runner that made them, which keeps no hold of the model. MERGE takes all
        from the logs.
        """
        engines = self.engines(None if share == MERGE else self._target)
        runner = self.runner(None if share == MERGE else self._target)
        name, repeats = f"bench@{self.job.name}", self.job.bench.repeats
        if runner.target is not None:
            runner.warm_up(engines, next(iter(self.inputs.sets.values()))[0])
        rows = WHOLE if share == MERGE else share
        records = runner.run(self.inputs.sets, engines, repeats, desc=name, share=rows)
        runner.target = None
        self.release()
        return records, runner

    def runner(self, target: CachedTarget | None) -> Runner:
        inputs = self.inputs
        eos_ids = self.job.target.eos_token_ids
        return Runner(target, inputs.tokenizer, eos_ids, self.job.bench, self.log, inputs.max_length)

    def engines(self, target: CachedTarget | None) -> list[Engine]:
        """What answers each request, in order; without a target only what the engines are called."""
        job, bench, k = self.job, self.job.bench, self.num_speculative_tokens
        engines = [Engine("baseline")] if job.mode != "draft" else []
        if job.has_draft:
            engines.append(Engine("draft", self._drafter() if target else None, k))
        if job.mode != "both":
            return engines
        if bench.prompt_lookup:
            engines.append(Engine("lookup", LookupDrafter(), k, only_repeat=0))
        if job.assistant is not None and job.draft is not None:
            engines.append(Engine("assistant", self._assistant() if target else None, k, only_repeat=0))
        if bench.bounds and bench.greedy:
            for name, right in (("oracle", True), ("null", False)):
                drafter = KnownAnswerDrafter(right, job.target.vocab_size)
                engines.append(Engine(name, drafter, k, only_repeat=1))
        return engines

    def _drafter(self) -> Drafter:
        if self.inputs.draft is None:
            return self._assistant()
        tree = self.job.bench.tree
        return ChainDrafter(self._session) if tree is None else TreeDrafter(self._session, tree)

    def _assistant(self) -> IndependentDrafter:
        assert self.job.assistant is not None
        vocab_size = self.job.target.vocab_size
        model = load_assistant(
            self.job.assistant, self.inputs.tokenizer, vocab_size, dtype=self._model.dtype, device=str(self.device)
        )
        return IndependentDrafter(model, self.inputs.max_length, vocab_size)

    @cached_property
    def _model(self) -> PreTrainedModel:
        device = device_for_loading(self.device, self.job.gpus_per_model)
        return optimise_for_inference(load_model(self.job.target, self.job.cache, device=device))

    @cached_property
    def _target(self) -> CachedTarget:
        ids = self.inputs.draft.config.aux_layer_ids if self.inputs.draft is not None else ()
        return CachedTarget(self._model, num_rows=1, max_length=self.inputs.max_length, aux_layer_ids=ids)

    @cached_property
    def _session(self) -> Eagle3Session:
        assert self.inputs.draft is not None
        draft = place(self.inputs.draft, _draft_dtype(self.job, self.device), self.device)
        return Eagle3Session(draft, self._model.get_input_embeddings().weight, self.inputs.max_length)

    def release(self) -> None:
        """Give the memory of models and caches back, to a server, say. Callers hold none of them any more."""
        if "_target" in self.__dict__:
            self._target.close()
        for name in ("_target", "_session", "_model"):
            self.__dict__.pop(name, None)
        gc.collect()
        release_memory(self.device)

    def _measure_stock(self) -> dict[str, Any]:
        model = load_model(self.job.target, self.job.cache, device=str(self.device))
        prompts = stock_prompts(self.inputs.sets, self.inputs.tokenizer)
        return time_stock_generate(model, prompts, self.job.target.eos_token_ids, self.job.bench)

    def _measure_sweep(self) -> dict[str, Any]:
        points = sweep(self.runner(self._target), self._drafter(), self.inputs.tuning, self.job.bench.sweep)
        return {"rows": [point.to_json() for point in points]}

    def _measure_costs(self) -> dict[str, Any]:
        """At the length that half of the benchmark's first answers have behind them."""
        tree, tokens = self.job.bench.tree, self.job.bench.cost_tokens
        context = int(statistics.median(map(len, self._first_prompts()))) + self.job.bench.max_new_tokens // 2
        fitting = [count for count in tokens if count < self.inputs.max_length // 2]
        top_ks = (tree.top_k,) if isinstance(tree, DynamicTree) else ()
        return measure_costs(self._target, self._session, fitting, context, top_ks=top_ks).to_json()

    def _measure_batches(self) -> dict[str, Any]:
        bench = self.job.bench
        work = batched.Workload(
            prompts=self._first_prompts(),
            max_new_tokens=bench.max_new_tokens,
            eos_ids=frozenset(self.job.target.eos_token_ids),
            num_speculative_tokens=self.num_speculative_tokens,
            sampling=sampling_of(bench),
            seed=bench.seed,
        )
        draft, sizes = self._session.draft, bench.batch_sizes
        rows = batched.measure(self._model, draft, work, batch_sizes=sizes, repeats=bench.repeats)
        return {"rows": [row.to_json() for row in rows]}

    def _first_prompts(self) -> list[list[int]]:
        """The first turn of every question."""
        return [
            prompt_tokens(self.inputs.tokenizer, [{"role": "user", "content": question.turns[0]}])
            for questions in self.inputs.sets.values()
            for question in questions
        ]

    def summary(self, records: Sequence[Record], runner: Runner) -> tuple[Summary, list[dict[str, Any]]]:
        """The summary, and a row for each answer that was scored."""
        rows, bench = self.log.rows, self.job.bench
        text_of = partial(_text_of, self.inputs.tokenizer)
        scores, scored = accuracy(
            records,
            self.inputs.sets,
            bench.accuracy,
            text_of,
            execute_code=bench.execute_code,
        )
        tree = bench.tree if self.job.has_draft else None
        conditions = Conditions(
            busy_share=rows["load"]["busy_share"],
            shared_cpu=self.about.device == "cpu" and most_at_once(records) > 1,
        )
        found = summary_of(
            records,
            num_speculative_tokens=self.num_speculative_tokens,
            greedy=bench.greedy,
            tree=tree is not None,
            conditions=conditions,
        )
        stock = over_stock(records, rows["stock"] if "stock" in self._needed else None, greedy=bench.greedy)
        summary = Summary(
            **dict(found),
            family=self.job.name,
            settings=self.inputs.settings,
            identity=self.about,
            conditions=conditions,
            num_speculative_tokens=self.num_speculative_tokens,
            tree=tree,
            sweep=self._sweep_points if "sweep" in self._needed else [],
            cost_model=_from_row(StepCosts, rows["costs"]) if "costs" in self._needed else None,
            batch=[BatchRow.model_validate(row) for row in rows["batch"]["rows"]] if "batch" in self._needed else [],
            accuracy=scores,
            notes=self.inputs.notes,
            num_skipped_turns=runner.num_skipped_turns,
            stock_generate_tok_s=stock.tok_s,
            baseline_over_stock=stock.ratio,
            baseline_equals_stock=stock.same,
        )
        return summary, scored


def _draft_dtype(job: Job, device: torch.device) -> torch.dtype:
    return decoding_dtype(job.bench.draft_dtype, getattr(torch, job.target.dtype), device)


def _from_row(kind: type[P], row: Mapping[str, Any]) -> P:
    """What a row of a log holds beside its id."""
    return kind.model_validate({name: value for name, value in row.items() if name != "id"})


def _check_machine(path: Path, now: dict[str, Any]) -> None:
    """Raise UserError where what is there was measured on another machine or by other versions."""
    if not path.exists():
        files.write_json(path, now)
    before = files.read_json(path, what="machine", made_by="specflow bench --output <folder>")
    if found := differences(before, now):
        raise UserError(
            f"{path.parent.parent} was measured on another machine or by other versions ({'; '.join(found[:4])}), and "
            "times of two are not mixed: give another folder"
        )


@dataclass(frozen=True)
class Measured:
    records: list[Record]
    summary: Summary
    scored: list[dict[str, Any]]
    """A row for each answer that was judged."""
    sets: Sets
    runner: Runner
    """Renders requests; has no model any more."""
    state: State
    """To be finished once the results are written."""


def measure(stack: ExitStack, job: Job, share: Share = WHOLE) -> Measured:
    """The whole job, or with MERGE what its shares left, put together. `stack` holds the resume state."""
    work = Work.open(stack, job, share)
    if share == MERGE:
        work.check_first()
    else:
        work.measure_first()
    records, runner = work.records(share)
    summary, scored = work.summary(records, runner)
    return Measured(records, summary, scored, work.inputs.sets, runner, work.state)


def _text_of(tokenizer: PreTrainedTokenizerBase, record: Record) -> str:
    return str(tokenizer.decode(record.token_ids, skip_special_tokens=True))


def measure_first(job: Job, share: Share) -> None:
    """What is measured once before the shares."""
    with ExitStack() as stack:
        Work.open(stack, job, share).measure_first()


def measure_share(job: Job, share: Share) -> None:
    """The questions of one share, by all engines in turn on this process's device."""
    with ExitStack() as stack:
        work = Work.open(stack, job, share)
        work.check_first()
        work.records(share)
