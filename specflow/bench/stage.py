"""The `bench` stage: target alone against target + exported draft, in process, batch 1; records, summary and plots."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from specflow import files
from specflow.bench import metrics, served_stage
from specflow.bench.identity import draft_digest, identity
from specflow.bench.metrics import Record
from specflow.bench.runner import (
    STOCK_PROMPTS,
    Engine,
    Runner,
    cache_length,
    prompt_tokens,
    spread,
    sweep,
    time_stock_generate,
)
from specflow.bench.served import Plan, check_possible
from specflow.bench.served_client import Request
from specflow.config import Bench, Family, Params
from specflow.data.prompt_sets import Question, read_prompt_set
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.lookup import LookupDrafter
from specflow.errors import UserError
from specflow.export.eagle3 import load_export
from specflow.paths import Log, Paths
from specflow.shares import MERGE, WHOLE, Share, delete_logs, only_key, open_log
from specflow.sources import resolve
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import TargetFacts, load_model, load_tokenizer, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specflow.drafters.eagle3 import Eagle3Draft

Sets = dict[str, list[Question]]
HELDOUT = "heldout"


def run(name: str, family: Family, params: Params, paths: Paths, log: Log, share: Share = WHOLE) -> dict[str, float]:
    """Benchmark the exported draft of a family. Returns headline metrics; speed in tokens per second, times in ms.

    Writes bench/records.jsonl, bench/summary.json, plots/survival.json and plots/sweep.json, and with bench.serve
    bench/served.json and bench/served_records.jsonl.
    """
    if family.bench.serve is not None:
        check_possible(family, name, paths, family.bench.serve)
    work = _Work.open(family, params, paths, share)
    bench = work.bench
    records, runner = _measure(name, work, share)
    num_speculative_tokens, sweep_rows = work.choice
    stock = work.log.rows["stock"] if bench.stock_generate else None
    summary = {
        "family": name,
        "settings": work.settings,
        "identity": work.about,
        **summarise(records, work.sets, num_speculative_tokens, bench),
        "sweep": sweep_rows,
        "num_speculative_tokens": num_speculative_tokens,
        "num_skipped_turns": runner.num_skipped_turns,
        **_over_stock(records, stock, bench.temperature),
    }
    served: dict[str, float] = {}
    if bench.serve is None:
        served_stage.forget(paths)
    else:
        requests = _served_requests(runner, work.sets, bench.serve.num_prompts)
        plan = Plan(name, family, paths, work.facts, bench.serve, requests, num_speculative_tokens)
        work.release()
        served = served_stage.headline(served_stage.run(plan, params, records, paths.bench))
    _write(summary, records, paths)
    work.log.close()
    delete_logs(paths.state, "bench")
    return headline(summary) | served


def _measure(name: str, work: _Work, share: Share) -> tuple[list[Record], Runner]:
    """Every record, and the runner that made them, which keeps no hold of the model."""
    if share == MERGE:
        work.check_first()
        runner, engines = work.runner(None), work.engines(None)
    else:
        work.measure_first()
        target, chain = work.load_engines()
        runner, engines = work.runner(target), work.engines(chain)
        runner.warm_up(engines, next(iter(work.sets.values()))[0])
    records = runner.run(work.sets, engines, work.bench.repeats, desc=f"bench@{name}")
    if runner.target is not None:
        runner.target.close()
        runner.target = None
    return records, runner


def run_first(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """What is measured once before the shares: the choice of K, and stock generate()."""
    work = _Work.open(family, params, paths, share)
    work.measure_first()
    work.log.close()
    return {}


def run_share(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """Measure the questions of one share, each on this process's device by all engines in turn."""
    work = _Work.open(family, params, paths, share)
    work.check_first()
    target, chain = work.load_engines()
    runner, engines = work.runner(target), work.engines(chain)
    runner.warm_up(engines, next(iter(work.sets.values()))[0])
    runner.run(work.sets, engines, work.bench.repeats, desc=f"bench@{name}", share=share)
    target.close()
    work.log.close()
    return {}


@dataclass
class _Work:
    """Inputs of the stage and what of it is done."""

    bench: Bench
    facts: TargetFacts
    paths: Paths
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    draft: Eagle3Draft
    sets: Sets
    tuning: list[Question]
    settings: dict[str, Any]
    about: dict[str, Any]
    max_length: int
    log: files.RowLog

    @classmethod
    def open(cls, family: Family, params: Params, paths: Paths, share: Share) -> _Work:
        bench, facts, folder = family.bench, read_facts(paths.target), paths.export / "eagle3"
        if bench.serve is not None and share != WHOLE:
            raise UserError("bench.serve measures servers one after the other: set resources.bench.shards to 1")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(facts, paths.cache)
        draft = load_export(folder)
        sets, tuning = load_questions(bench, params, paths)
        questions = {key: [q.question_id for q in value] for key, value in sets.items()}
        settings = {
            **bench.model_dump(exclude={"serve"}),
            "questions": questions,
            "sweep_questions": [q.question_id for q in tuning],
        }
        # before anything slow: a question that does not fit ends the stage
        fixed = bench.num_speculative_tokens
        largest = max(bench.sweep) if fixed == "auto" else fixed
        context = facts.max_position_embeddings
        max_length = cache_length(tokenizer, {**sets, "sweep": tuning}, bench, largest, context)
        about = identity(facts, folder, paths.root, device)
        work_key = files.sha256_json([settings, facts.digest, facts.template_digest, draft_digest(folder)])
        machine = files.sha256_json([about[part] for part in ("versions", "cpu", "device")])
        key = f"{work_key}:{machine}"  # times of different machines are not mixed
        if share == MERGE:
            key = only_key(paths.state, "bench", f"{work_key}:")
        log = open_log(paths.state, "bench", key, share)
        if share.count > 1:
            log.append({"id": "identity", **about})
        elif share == MERGE:  # the machine that measured, not the one that puts the records together
            about = {name: value for name, value in log.rows["identity"].items() if name != "id"}
        return cls(bench, facts, paths, device, tokenizer, draft, sets, tuning, settings, about, max_length, log)

    def measure_first(self) -> None:
        """Stock generate() and the sweep over K, unless a log has them."""
        if self.bench.stock_generate and "stock" not in self.log.rows:
            self._measure_stock()
        if self.bench.num_speculative_tokens == "auto" and "sweep" not in self.log.rows:
            target, chain = self.load_engines()
            rows = sweep(self.runner(target), chain, self.tuning, self.bench.sweep)
            self.log.append({"id": "sweep", "rows": rows})
            target.close()

    def check_first(self) -> None:
        """Raise UserError unless the logs hold what is measured once: shares must not choose a K each."""
        needed = {"stock": self.bench.stock_generate, "sweep": self.bench.num_speculative_tokens == "auto"}
        MERGE.check_nothing_left("bench", sum(said and row not in self.log.rows for row, said in needed.items()))

    @property
    def choice(self) -> tuple[int, list[dict[str, float]]]:
        """K and the sweep that chose it (none for a given K). A resumed run keeps the choice it had made."""
        if self.bench.num_speculative_tokens != "auto":
            return self.bench.num_speculative_tokens, []
        rows: list[dict[str, float]] = self.log.rows["sweep"]["rows"]
        return int(max(rows, key=lambda row: row["tok_s"])["num_speculative_tokens"]), rows

    def runner(self, target: CachedTarget | None) -> Runner:
        return Runner(target, self.tokenizer, self.facts.eos_token_ids, self.bench, self.log, self.max_length)

    def engines(self, chain: ChainDrafter | None) -> list[Engine]:
        k, _ = self.choice
        engines = [Engine("baseline"), Engine("draft", chain, k)]
        if self.bench.prompt_lookup:
            engines.append(Engine("lookup", LookupDrafter(), k, max_repeats=1))
        return engines

    @cached_property
    def _model(self) -> PreTrainedModel:
        return optimise_for_inference(load_model(self.facts, self.paths.cache, device=str(self.device)))

    def release(self) -> None:
        """Give the in-process model's memory to a server. Callers hold no engine of it any more."""
        self.__dict__.pop("_model", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load_engines(self) -> tuple[CachedTarget, ChainDrafter]:
        model, length = self._model, self.max_length
        target = CachedTarget(model, num_rows=1, max_length=length, aux_layer_ids=self.draft.config.aux_layer_ids)
        draft = self.draft.to(self.device, model.dtype if self.device.type == "cuda" else torch.float32)
        return target, ChainDrafter(draft, model.get_input_embeddings().weight, length)

    def _measure_stock(self) -> None:
        """Speed of transformers' generate() with the model as it loads, on the first turns of some questions."""
        questions = [(name, question) for name, questions in self.sets.items() for question in questions]
        chosen = questions[:: max(1, len(questions) // STOCK_PROMPTS)][:STOCK_PROMPTS]
        prompts = {
            f"{name}/{question.question_id}": prompt_tokens(
                self.tokenizer, [{"role": "user", "content": question.turns[0]}]
            )
            for name, question in chosen
        }
        model = load_model(self.facts, self.paths.cache, device=str(self.device))
        self.log.append({"id": "stock", **time_stock_generate(model, prompts, self.facts.eos_token_ids, self.bench)})
        del model
        gc.collect()


def load_questions(bench: Bench, params: Params, paths: Paths) -> tuple[Sets, list[Question]]:
    """Questions of each prompt set, and those held-out ones on which K is tuned: no question is among both."""
    prompts = paths.prompts / "eval.jsonl"
    auto = bench.num_speculative_tokens == "auto"
    heldout: list[Question] = []
    if auto or HELDOUT in bench.prompt_sets:
        rows = files.read_jsonl(prompts, what="held-out prompts", made_by="specflow prepare <family>")
        heldout = [_question(row) for row in rows]
    tuning: list[Question] = []
    if auto:
        reserved = len(heldout) // 2 if HELDOUT in bench.prompt_sets else len(heldout)
        tuning = spread(heldout, min(bench.sweep_prompts, reserved)) if reserved else []
        if not tuning:
            raise UserError(
                f"{prompts} has {len(heldout)} prompts, too few to choose num_speculative_tokens on: "
                "raise data.eval_conversations or set bench.num_speculative_tokens to a number"
            )
    taken = {question.question_id for question in tuning}
    sets: Sets = {}
    for name in bench.prompt_sets:
        if name == HELDOUT:
            questions = [question for question in heldout if question.question_id not in taken]
        else:
            questions = read_prompt_set(name, resolve(params.prompt_sets[name], paths.cache))
        if not questions:
            raise UserError(f"prompt set {name} has no questions: raise data.eval_conversations or leave the set out")
        sets[name] = spread(questions, bench.num_prompts)
    return sets, tuning


def _served_requests(runner: Runner, sets: Sets, num_prompts: int | None) -> list[Request]:
    """The requests of the benchmark in process, of at most `num_prompts` questions a set."""
    chosen = {name: spread(questions, num_prompts or len(questions)) for name, questions in sets.items()}
    return [
        Request(name, question.question_id, question.category, turn, prompt, question.turns[turn])
        for name, question, turn, prompt in runner.requests(chosen)
    ]


def _question(row: Mapping[str, Any]) -> Question:
    """The user turns of a held-out conversation."""
    turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return Question(row["id"], row["category"], turns)


def _over_stock(records: Sequence[Record], stock: Mapping[str, Any] | None, temperature: float) -> dict[str, Any]:
    """The baseline against stock generate(), on the requests that stock answered."""
    if stock is None:
        return {"stock_generate_tok_s": None, "baseline_over_stock": None, "baseline_equals_stock": None}
    first_turns = [r for r in records if r.engine == "baseline" and r.turn == 0]
    own = [record for record in first_turns if f"{record.set}/{record.question_id}" in stock["answers"]]
    same = all(record.token_ids == stock["answers"][f"{record.set}/{record.question_id}"] for record in own)
    return {
        "stock_generate_tok_s": stock["tok_s"],
        "baseline_over_stock": metrics.tok_s(own) / stock["tok_s"],
        "baseline_equals_stock": same if temperature == 0.0 else None,
    }


def summarise(records: Sequence[Record], sets: Sets, num_speculative_tokens: int, bench: Bench) -> dict[str, Any]:
    """Summary of each set and over all of them, costs and verdict."""

    def of(chosen: Sequence[Record]) -> dict[str, Any]:
        return metrics.summarise(
            chosen, num_speculative_tokens=num_speculative_tokens, temperature=bench.temperature, seed=bench.seed
        )

    overall = of(records)
    baseline, drafted = ([r for r in records if r.engine == engine] for engine in ("baseline", "draft"))
    costs = metrics.cost(baseline, drafted, overall["acceptance_length"])
    return {
        "sets": {name: of([record for record in records if record.set == name]) for name in sets},
        "overall": overall,
        "cost": costs,
        "verdict": metrics.verdict(overall, costs, num_speculative_tokens),
    }


def _write(summary: Mapping[str, Any], records: Sequence[Record], paths: Paths) -> None:
    files.write_jsonl(paths.bench / "records.jsonl", (record.to_json() for record in records))
    files.write_json(paths.bench / "summary.json", summary)
    survival = [
        {"set": name, "position": position, "survival": share}
        for name, of_set in summary["sets"].items()
        for position, share in enumerate(of_set["survival"], 1)
    ]
    files.write_json(paths.plot("survival.json"), survival)
    names = ("acceptance_length", "tok_s", "speedup")
    measured = {n: summary["overall"][n] for n in names} | {"num_speculative_tokens": summary["num_speculative_tokens"]}
    files.write_json(paths.plot("sweep.json"), summary["sweep"] or [measured])


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Flat metrics over all sets, and `<set>.<metric>` of each."""
    overall = summary["overall"]
    names = ("acceptance_length", "acceptance_length_macro", "speedup", "decode_speedup", "tok_s", "baseline_tok_s")
    of_each = ("speedup", "acceptance_length", "tok_s", "baseline_tok_s")
    flat: dict[str, Any] = {name: overall[name] for name in names}
    flat["speedup_ci_low"], flat["speedup_ci_high"] = overall["speedup_ci"]
    flat |= {f"survival_{i}": share for i, share in enumerate(overall["survival"], 1)}
    flat |= {"num_speculative_tokens": summary["num_speculative_tokens"], "lossless_rate": overall["lossless_rate"]}
    flat |= summary["cost"]
    flat |= {name: summary[name] for name in ("stock_generate_tok_s", "baseline_over_stock")}
    if overall["lookup"]:
        flat["lookup_speedup"] = overall["lookup"]["speedup"]
    for name, of_set in summary["sets"].items():
        flat |= {f"{name}.{metric}": of_set[metric] for metric in of_each}
    return {name: float(value) for name, value in flat.items() if value is not None}
