"""Benchmarks made up to the second, on disk as the bench stage leaves them: for what reads and compares them."""

from __future__ import annotations

from typing import Any

from specflow import files
from specflow.bench.statistics.records import Record
from specflow.files import sha256_bytes
from specflow.paths import Paths
from specflow.results.schema import Settings, Summary
from tests.results import IDENTITY, changed, summary_from

NUM_TOKENS = 13
BASE_S = 1.0
"""Seconds of the target alone for one request."""


def make_records(speedups: dict[str, float], *, base_s: float = BASE_S, repeats: int = 3) -> list[Record]:
    """Requests of one set, one turn each: by question id how many times as fast the draft answers as the target."""
    records = []
    for repeat in range(repeats):
        for question, speedup in speedups.items():
            for engine, steps, seconds in (
                ("baseline", [[0, 0]] * (NUM_TOKENS - 1), base_s),
                ("draft", [[1, 1]] * ((NUM_TOKENS - 1) // 2), base_s / speedup),
            ):
                records.append(
                    Record(
                        set="questions",
                        question_id=question,
                        category="any",
                        turn=0,
                        repeat=repeat,
                        engine=engine,
                        order=0,
                        num_prompt_tokens=5,
                        token_ids=list(range(NUM_TOKENS)),
                        steps=steps,
                        num_cut=0,
                        prefill_s=0.0,
                        draft_s=0.0,
                        verify_s=seconds,
                        decode_s=seconds,
                        finish_reason="length",
                    )
                )
    return records


def make_summary(records: list[Record], *, draft: str = "draft", **changes: Any) -> Summary:
    """The summary of these records. `changes` are of its settings or identity, whichever has the field."""
    settings = {name: value for name, value in changes.items() if name in Settings.model_fields}
    identity = {name: value for name, value in changes.items() if name not in settings}
    return summary_from(
        records,
        num_speculative_tokens=1,
        settings={"max_new_tokens": NUM_TOKENS, "max_turns": 1, **settings},
        identity=changed(IDENTITY, draft_digest=sha256_bytes(draft.encode()), **identity),
    )


def write_bench(paths: Paths, speedups: dict[str, float], *, draft: str = "draft", **changes: Any) -> dict[str, float]:
    """Benchmark and exported draft of a family; returns the stage's metrics, which lie on disk too."""
    records = make_records(speedups)
    summary = make_summary(records, draft=draft, **changes)
    files.write_json(paths.bench / "summary.json", summary.to_json())
    files.write_jsonl(paths.bench / "records.jsonl", (record.to_json() for record in records))
    folder = paths.export / "eagle3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(draft, encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    overall = summary.overall
    flat = {
        "acceptance_length": overall.acceptance_length,
        "speedup": overall.speedup,
        "survival_1": overall.survival[0],
        "questions.speedup": overall.speedup,
        "num_speculative_tokens": 1,
        "lossless_rate": 1.0,
        "seconds": 8.0,
        "gpu_seconds": 16.0,
    }
    files.write_json(paths.metrics("bench"), flat)
    return flat
