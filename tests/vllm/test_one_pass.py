"""Answers and their hidden states in one pass through a real vLLM: the states that transformers computes, row by row.

Conversations of several turns, ended by themselves or cut, greedy and drawn. Most states are those of decoding steps:
what a prefill computes once more is counted, to the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from scipy import stats

from specflow.answer_states import keeping
from specflow.config import parse_params
from specflow.extract import stage as extract
from specflow.files import read_jsonl
from specflow.hidden_states import HiddenStateStore
from specflow.sample import stage as sampling
from specflow.serving.family import child_server
from specflow.serving.server import Endpoint
from specflow.targets.model import load_model
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import make_tiny_target
from tests.unit.sample.test_stage import lean_to_end, make_prompts
from tests.vllm.test_capture import TOLERANCE, assert_same_states, open_store

pytestmark = pytest.mark.vllm
PROMPTS = make_prompts(24, seed=5)
BLOCK = 32
"""Tokens of a cache block that `with_capture` asks the CPU build for."""
LAYERS = [0, 3, 6]
DRAWS = 1500


def project(root: Path, target: Path, venv: str, **changes: dict[str, Any]) -> TinyProject:
    made = tiny_project(root, target)
    family = made.settings["families"]["tiny"]
    family["serve"] = {"venv": venv, "start_timeout_s": 300}
    family["sample"] = {"engine": "vllm", "keep_states": True, "max_new_tokens": 60, "concurrency": 4, "batch_size": 24}
    family["sample"] |= {"temperatures": [0.0, 1.0], **changes.get("sample", {})}
    family["extract"] |= {"engine": "vllm", "aux_layer_ids": LAYERS, "shard_bytes": 400_000}
    family["extract"] |= changes.get("extract", {})
    made.params = parse_params(made.settings)
    write_split(made.paths.prompts, PROMPTS[:18], PROMPTS[18:])
    return made


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_pass") / "target"
    return lean_to_end(
        make_tiny_target(folder, hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    )


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, target: Path, vllm_venv: str) -> TinyProject:
    made = project(tmp_path_factory.mktemp("sampled") / "p", target, vllm_venv)
    (made.root / "metrics.json").write_text(json.dumps(made.run(sampling)))
    return made


def rows_of(made: TinyProject) -> list[dict[str, Any]]:
    return [row for split in sampling.SPLITS for row in read_jsonl(made.paths.samples / f"{split}.jsonl")]


def captured_by_transformers(root: Path, target: Path, sampled: TinyProject, layers: list[int]) -> HiddenStateStore:
    settings = {"engine": "transformers", "aux_layer_ids": layers}
    made = project(root, target, "none", sample={"engine": "transformers", "keep_states": False}, extract=settings)
    write_split(
        made.paths.samples, *(read_jsonl(sampled.paths.samples / f"{split}.jsonl") for split in sampling.SPLITS)
    )
    made.run(extract)
    return open_store(made)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, target: Path, sampled: TinyProject) -> HiddenStateStore:
    return captured_by_transformers(tmp_path_factory.mktemp("reference") / "p", target, sampled, LAYERS)


@pytest.fixture(scope="module")
def store(sampled: TinyProject) -> HiddenStateStore:
    """Of the parked states, all but two: one deleted, one damaged, which the engine is asked for."""
    rows, metrics = rows_of(sampled), json.loads((sampled.root / "metrics.json").read_text())
    (folder,) = (sampled.paths.state / "parked").iterdir()
    parked = sorted(folder.glob("*.safetensors"))
    assert len(parked) == len(rows) == metrics["rows_with_states"]
    parked[0].unlink()
    parked[1].write_bytes(parked[1].read_bytes()[:-1] + b"?")
    found = sampled.run(extract)
    assert found["rows_from_sampling"] == len(rows) - 2 and found["captured_rows"] == len(rows)
    assert not folder.exists() and found["shards"] > 2
    return open_store(sampled)


def test_greedy_answers_are_the_in_process_engines(tmp_path: Path, target: Path, sampled: TinyProject) -> None:
    plain = project(
        tmp_path,
        target,
        "none",
        sample={"engine": "transformers", "keep_states": False},
        extract={"engine": "transformers"},
    )
    plain.run(sampling)
    greedy = {row["id"]: row["token_ids"] for row in rows_of(plain) if row["temperature"] == 0}
    rows = {row["id"]: row["token_ids"] for row in rows_of(sampled) if row["temperature"] == 0}
    assert rows == greedy and 8 < len(rows) < len(PROMPTS)


def test_states_are_those_of_transformers_row_by_row(
    sampled: TinyProject, store: HiddenStateStore, reference: HiddenStateStore
) -> None:
    assert_same_states(store, reference, TOLERANCE)
    rows, metrics = rows_of(sampled), json.loads((sampled.root / "metrics.json").read_text())
    cached = {row["id"]: (len(row["token_ids"]) - 1) // BLOCK * BLOCK for row in rows}
    assert metrics["recomputed_tokens"] == sum(len(row["token_ids"]) - cached[row["id"]] for row in rows)
    decoded = sum(max(0, cached[row["id"]] - row["spans"][-1][0]) for row in rows)
    assert decoded > 0.4 * metrics["generated_tokens"] and max(len(row["spans"]) for row in rows) > 1
    reasons = {turn["finish_reason"] for row in rows for turn in row["turns"]}
    assert reasons == {"stop", "length"} and {row["temperature"] for row in rows} == {0.0, 1.0}


@pytest.mark.parametrize("layers", [[1, 3, 6], [0, 4, 6], [0, 3, 5]])
def test_a_shifted_layer_is_caught(
    tmp_path: Path, target: Path, sampled: TinyProject, store: HiddenStateStore, layers: list[int]
) -> None:
    shifted = captured_by_transformers(tmp_path, target, sampled, layers)
    with pytest.raises(AssertionError, match="of the largest state"):
        assert_same_states(store, shifted, 0.1)


def test_states_of_the_token_before_are_caught(
    store: HiddenStateStore, reference: HiddenStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HiddenStateStore.read

    def off_by_one(self: HiddenStateStore, row: Any) -> Any:
        tokens, aux, final = read(self, row)
        return (tokens, aux, final) if self is reference else (tokens, aux.roll(1, 0), final.roll(1, 0))

    monkeypatch.setattr(HiddenStateStore, "read", off_by_one)
    with pytest.raises(AssertionError, match="of the largest state"):
        assert_same_states(store, reference, 0.1)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, target: Path, vllm_venv: str) -> Iterator[Endpoint]:
    """A server that hands out states while it samples."""
    made = project(tmp_path_factory.mktemp("draws") / "p", target, vllm_venv)
    with keeping(made.family, made.facts, made.paths, 400, [400]) as states:
        family = made.family.model_copy(update={"serve": states.serve})
        with child_server(family, "tiny", made.paths, engine="vllm", draft=False, edit=states.edit) as server:
            yield server.endpoint


def test_draws_follow_the_targets_distribution(target: Path, sampled: TinyProject, endpoint: Endpoint) -> None:
    """The method verifies each sampled token as a draft of the next one, which must not show in what is drawn."""
    prompt, temperature = rows_of(sampled)[0]["token_ids"][:9], 0.3
    model = load_model(sampled.facts, sampled.paths.cache)

    @torch.inference_mode()
    def distribution(tokens: list[int]) -> torch.Tensor:
        return torch.softmax(model(torch.tensor([tokens])).logits[0, -1].double() / temperature, -1)

    with httpx.Client(base_url=endpoint.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:

        def draw(seed: int) -> list[int]:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "temperature": temperature, "seed": seed}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answer: dict[str, Any] = client.post("/v1/completions", json=body).json()
            return list(answer["choices"][0]["token_ids"])

        drawn = list(pool.map(draw, range(DRAWS)))
        assert list(pool.map(draw, range(40))) == drawn[:40], "a seed gives the same draws whatever runs beside it"
    first = distribution(prompt)
    second = torch.zeros_like(first)
    for token in first.topk(60).indices.tolist():
        second += first[token] * distribution([*prompt, token])
    for place, expected in enumerate((first, second)):
        counts = torch.bincount(torch.tensor([tokens[place] for tokens in drawn]), minlength=len(first)).double()
        often = expected * DRAWS >= 5
        observed = [*counts[often].tolist(), float(counts[~often].sum())]
        wanted = [*(expected[often] * DRAWS).tolist(), float(DRAWS - (expected[often] * DRAWS).sum())]
        assert stats.chisquare(observed, wanted).pvalue > 1e-3, f"token {place}"
