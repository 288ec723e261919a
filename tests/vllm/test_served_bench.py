"""The bench stage through a real vLLM: what it serves is what was decoded in process, and its counts add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specflow.bench import stage
from specflow.config import parse_params
from specflow.files import write_json
from tests.captures import TinyProject
from tests.vllm.test_export import MAX_NEW_TOKENS, K, trained

BENCH = {
    "prompt_sets": ["heldout"],
    "num_speculative_tokens": K,
    "max_new_tokens": MAX_NEW_TOKENS,
    "stock_generate": False,
    "prompt_lookup": False,
    "draft_dtype": "float32",  # the server's
    "serve": {"engine": "vllm", "concurrency": [1, 2], "repeats": 2},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, vllm_venv: str) -> TinyProject:
    made = trained(tmp_path_factory.mktemp("served") / "project", tiny_target, vllm_venv)
    made.settings["families"]["tiny"]["bench"] = BENCH
    made.settings["offline"] = ["tiny"]
    made.params = parse_params(made.settings)
    write_json(made.paths.metrics("train_offline"), {f"survival_{i}": 0.5**i for i in range(1, K + 1)})
    return made


@pytest.fixture(scope="module")
def metrics(project: TinyProject) -> dict[str, float]:
    return project.run(stage)


def rows(project: TinyProject, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.paths.bench / name).read_text(encoding="utf-8").splitlines()]


def test_served_equals_in_process_step_by_step(project: TinyProject, metrics: dict[str, float]) -> None:
    served = json.loads((project.paths.bench / "served.json").read_text(encoding="utf-8"))
    own = {(r["question_id"], r["engine"]): r for r in rows(project, "records.jsonl") if r["repeat"] == 0}
    records = rows(project, "served_records.jsonl")
    # 5 questions: 5 requests at 1 at once, 2 passes at 2 at once so that each user answers four
    assert len(records) == 2 * 2 * (5 + 10) and not any(record["error"] for record in records)
    for record in records:
        expected = own[record["question_id"], record["engine"]]
        assert record["token_ids"] == expected["token_ids"]
        assert record["steps"] == expected["steps"]
        assert record["num_prompt_tokens"] == expected["num_prompt_tokens"] == record["server_prompt_tokens"]
        assert len(record["chunk_s"]) <= record["num_tokens"] and record["chunk_s"] == sorted(record["chunk_s"])
    assert [level["lossless_rate"] for level in served["levels"]] == [1.0, 1.0]
    assert 1.3 < metrics["served_acceptance_length"] < K + 0.9


def test_requests_add_up_to_the_servers_counters(project: TinyProject, metrics: dict[str, float]) -> None:
    served = json.loads((project.paths.bench / "served.json").read_text(encoding="utf-8"))
    assert served["counters_agree"] is True
    for level in served["levels"]:
        counters = [
            block["counters"]
            for block in served["blocks"]
            if block["engine"] == "draft" and block["concurrency"] == level["concurrency"]
        ]
        steps, accepted = (sum(part[name] for part in counters) for name in ("num_steps", "num_accepted"))
        assert level["acceptance"]["from"] == "requests" and level["acceptance"]["num_steps"] == steps
        assert level["acceptance"]["length"] == pytest.approx(1 + accepted / steps)
        by_position = [sum(part[f"accepted_at_{i}"] for part in counters) / steps for i in range(K)]
        assert level["acceptance"]["survival"] == pytest.approx(by_position)
    assert all(block["counters"] is None for block in served["blocks"] if block["engine"] == "baseline")


def test_gap(project: TinyProject, metrics: dict[str, float]) -> None:
    found = json.loads((project.paths.bench / "served.json").read_text(encoding="utf-8"))["gap"]
    assert found["served"] == found["in_process"] and found["gap_to_in_process"] == 0.0
    expected = 1 + sum(0.5**i for i in range(1, K + 1))
    assert metrics["train_to_serve_gap"] == pytest.approx(found["served"] / expected - 1) == found["gap"]
    checks = {check["what"]: check["ok"] for check in found["checks"]}
    what = {"export", "chat template", "prompt length", "dtype", "K", "target's output"}
    assert checks == dict.fromkeys(what, True)
    assert found["apart"] and "Server and in-process chain agree" in found["advice"][0]


def test_servers_are_a_pair_and_told(project: TinyProject, metrics: dict[str, float]) -> None:
    servers = json.loads((project.paths.bench / "served.json").read_text(encoding="utf-8"))["servers"]
    assert servers["baseline"]["version"] == servers["draft"]["version"]
    assert servers["baseline"]["flags"] == servers["draft"]["flags"]
    assert "--speculative-config" in servers["draft"]["command"]
    assert "--speculative-config" not in servers["baseline"]["command"]
    assert ["--no-enable-prefix-caching", ""] in servers["draft"]["flags"]
