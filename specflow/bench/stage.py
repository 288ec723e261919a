"""The `bench` stage: target alone against target + exported draft, in process, batch 1; records, summary and plots."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from specflow import files
from specflow.bench import metrics
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
from specflow.config import Bench, Family, Params
from specflow.data.prompt_sets import Question, read_prompt_set
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.lookup import LookupDrafter
from specflow.errors import UserError
from specflow.export.eagle3 import load_export
from specflow.paths import Log, Paths
from specflow.sources import resolve
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import TargetFacts, load_model, load_tokenizer, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specflow.drafters.eagle3 import Eagle3Draft

Sets = dict[str, list[Question]]
HELDOUT = "heldout"


def run(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Benchmark the exported draft of a family. Returns headline metrics; speed in tokens per second, times in ms.

    Writes bench/records.jsonl, bench/summary.json, plots/survival.json and plots/sweep.json.
    """
    bench, facts = family.bench, read_facts(paths.target)
    cache, folder = paths.cache, paths.export / "eagle3"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(facts, cache)
    draft = load_export(folder)
    sets, tuning = load_questions(bench, params, paths)
    settings = {**bench.model_dump(), "questions": {key: [q.question_id for q in value] for key, value in sets.items()}}
    settings["sweep_questions"] = [q.question_id for q in tuning]
    about = identity(facts, folder, paths.root, device)
    digests = [facts.digest, facts.template_digest, draft_digest(folder)]
    key = files.sha256_json([settings, digests, about["versions"], about["cpu"]])
    row_log = files.RowLog(paths.state / "bench.jsonl", key)

    fixed = bench.num_speculative_tokens
    largest = max(bench.sweep) if fixed == "auto" else fixed
    # before anything slow: a question that does not fit ends the stage
    max_length = cache_length(tokenizer, {**sets, "sweep": tuning}, bench, largest, facts.max_position_embeddings)
    stock = _stock(facts, paths, tokenizer, sets, bench, device, row_log) if bench.stock_generate else None
    target, chain = _load_engines(facts, paths, draft, max_length, device)
    runner = Runner(target, tokenizer, facts.eos_token_ids, bench, row_log)
    num_speculative_tokens, sweep_rows = _choose(runner, chain, tuning, bench, row_log)
    engines = [Engine("baseline"), Engine("draft", chain, num_speculative_tokens)]
    if bench.prompt_lookup:
        engines.append(Engine("lookup", LookupDrafter(), num_speculative_tokens, max_repeats=1))
    runner.warm_up(engines, next(iter(sets.values()))[0])
    records = runner.run(sets, engines, bench.repeats, desc=f"bench@{name}")
    target.close()

    summary = summarise(records, sets, num_speculative_tokens, bench)
    summary = {
        "family": name,
        "settings": settings,
        "identity": about,
        **summary,
        "sweep": sweep_rows,
        "num_speculative_tokens": num_speculative_tokens,
        "num_skipped_turns": runner.num_skipped_turns,
        **_over_stock(records, stock, bench.temperature),
    }
    _write(summary, records, paths)
    row_log.close(delete=True)
    return headline(summary)


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


def _question(row: Mapping[str, Any]) -> Question:
    """The user turns of a held-out conversation."""
    turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return Question(row["id"], row["category"], turns)


def _load_engines(
    facts: TargetFacts,
    paths: Paths,
    draft: Eagle3Draft,
    max_length: int,
    device: torch.device,
) -> tuple[CachedTarget, ChainDrafter]:
    model = optimise_for_inference(load_model(facts, paths.cache, device=str(device)))
    target = CachedTarget(model, num_rows=1, max_length=max_length, aux_layer_ids=draft.config.aux_layer_ids)
    draft = draft.to(device, model.dtype if device.type == "cuda" else torch.float32)
    return target, ChainDrafter(draft, model.get_input_embeddings().weight, max_length)


def _choose(
    runner: Runner, chain: ChainDrafter, tuning: Sequence[Question], bench: Bench, row_log: files.RowLog
) -> tuple[int, list[dict[str, float]]]:
    """K and the sweep that chose it (none for a given K). A resumed run keeps the choice it had made."""
    if bench.num_speculative_tokens != "auto":
        return bench.num_speculative_tokens, []
    if "sweep" not in row_log.rows:
        row_log.append({"id": "sweep", "rows": sweep(runner, chain, tuning, bench.sweep)})
    rows: list[dict[str, float]] = row_log.rows["sweep"]["rows"]
    return int(max(rows, key=lambda row: row["tok_s"])["num_speculative_tokens"]), rows


def _stock(
    facts: TargetFacts,
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sets,
    bench: Bench,
    device: torch.device,
    row_log: files.RowLog,
) -> dict[str, Any]:
    """Speed of transformers' generate() with the model as it loads, on the first turns of some questions."""
    if "stock" not in row_log.rows:
        questions = [(name, question) for name, questions in sets.items() for question in questions]
        chosen = questions[:: max(1, len(questions) // STOCK_PROMPTS)][:STOCK_PROMPTS]
        prompts = {
            f"{name}/{question.question_id}": prompt_tokens(tokenizer, [{"role": "user", "content": question.turns[0]}])
            for name, question in chosen
        }
        model = load_model(facts, paths.cache, device=str(device))
        row_log.append({"id": "stock", **time_stock_generate(model, prompts, facts.eos_token_ids, bench)})
        del model
        gc.collect()
    stock: dict[str, Any] = row_log.rows["stock"]
    return stock


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
