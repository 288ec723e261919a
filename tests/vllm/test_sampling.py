"""Sampling through a real vLLM: the rows of the in-process engine, also when the server is killed on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from specflow.config import parse_params
from specflow.errors import UserError
from specflow.files import RowLog, read_jsonl
from specflow.sample import stage as sampling
from specflow.serving.engines import Install
from specflow.serving.family import child_server
from specflow.serving.server import Endpoint
from tests.captures import TinyProject, tiny_project, write_split
from tests.unit.sample.test_stage import lean_to_end, make_prompts

pytestmark = pytest.mark.vllm
LIMIT = 400
PROMPTS = make_prompts(17, seed=3)


def project(root: Path, target: Path, serve: dict[str, Any], **sample: Any) -> TinyProject:
    made = tiny_project(root, target, extract={"max_length_tokens": LIMIT})
    family = made.settings["families"]["tiny"]
    family["serve"] = serve
    family["sample"] = {"max_new_tokens": 16, "batch_size": 4, "concurrency": 4, **sample}
    made.params = parse_params(made.settings)
    write_split(made.paths.prompts, PROMPTS[:12], PROMPTS[12:])
    return made


def rows_of(made: TinyProject) -> list[dict[str, Any]]:
    return [row for split in sampling.SPLITS for row in read_jsonl(made.paths.samples / f"{split}.jsonl")]


def without_engine(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "engine"} for row in rows]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Path:
    return lean_to_end(tiny_target)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory, target: Path) -> list[dict[str, Any]]:
    made = project(tmp_path_factory.mktemp("in_process"), target, {})
    made.run(sampling)
    return rows_of(made)


def test_a_killed_server_is_started_again_and_no_row_is_lost_or_twice(
    tmp_path: Path,
    target: Path,
    vllm_venv: str,
    in_process: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = project(tmp_path, target, {"venv": vllm_venv}, engine="vllm", concurrency=2)
    append, killed, others = RowLog.append, [], servers()

    def killing(self: RowLog, row: Any) -> None:
        append(self, row)
        if len(self.rows) == 3 and not killed:
            killed.extend(servers() - others)
            for process in killed:
                os.kill(process, signal.SIGKILL)

    monkeypatch.setattr(RowLog, "append", killing)
    monkeypatch.setattr(logging.getLogger("specflow"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="specflow"):
        made.run(sampling)
    assert killed and "server 0 is lost (it was killed by signal 9)" in caplog.text
    assert without_engine(rows_of(made)) == without_engine(in_process)
    assert sorted(log.name for log in (made.paths.state / "servers").iterdir()) == [
        "sample-0-restart1.log",
        "sample-0.log",
    ]
    assert servers() == others  # stopped with the stage


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, target: Path, vllm_venv: str) -> Iterator[Endpoint]:
    """A server that somebody else runs, as far as the stage knows."""
    made = project(tmp_path_factory.mktemp("server"), target, {"venv": vllm_venv, "max_model_len": LIMIT})
    with child_server(made.family, "tiny", made.paths, engine="vllm", draft=False) as server:
        yield server.endpoint


def test_greedy_rows_are_the_in_process_engines_token_for_token(
    tmp_path: Path, target: Path, endpoint: Endpoint, vllm_install: Install, in_process: list[dict[str, Any]]
) -> None:
    made = project(tmp_path, target, {"url": endpoint.url}, engine="vllm")
    metrics = made.run(sampling)
    rows = rows_of(made)
    assert without_engine(rows) == without_engine(in_process)
    assert {row["engine"] for row in rows} == {f"vllm {vllm_install.version}"}
    turns = [turn for row in rows for turn in row["turns"]]
    reasons = [turn["finish_reason"] for turn in turns]
    assert {"stop", "length"} == set(reasons) and max(len(row["turns"]) for row in rows) > 1  # worth its name
    assert metrics["finished_by_length"] == reasons.count("length")
    assert metrics["refused_conversations"] == metrics["retokenised_turns"] == 0


def test_draws_are_repeatable_and_a_row_knows_its_temperature(
    tmp_path: Path, target: Path, endpoint: Endpoint, in_process: list[dict[str, Any]]
) -> None:
    """Above temperature 0 the draws are the server's, not the in-process engine's; the seed makes them repeatable."""

    def rows(name: str, **sample: Any) -> dict[str, dict[str, Any]]:
        settings = {"engine": "vllm", "temperatures": [0.0, 1.0], **sample}
        made = project(tmp_path / name, target, {"url": endpoint.url}, **settings)
        made.run(sampling)
        return {row["id"]: row for row in rows_of(made)}

    one, again, other = rows("one"), rows("again", concurrency=2), rows("other", seed=1)
    assert one == again
    hot = {id for id, row in one.items() if row["temperature"] == 1.0}
    assert 2 <= len(hot) <= 10
    greedy = {row["id"]: row["token_ids"] for row in in_process}
    assert all(row["token_ids"] == greedy[id] for id, row in one.items() if id not in hot)
    assert sum(one[id]["token_ids"] != greedy[id] for id in hot) > len(hot) // 2
    both_hot = [id for id in hot if other[id]["temperature"] == 1.0]
    assert any(other[id]["token_ids"] != one[id]["token_ids"] for id in both_hot)


def test_a_server_of_another_model_or_too_short_a_context_is_refused(
    tmp_path: Path, target: Path, endpoint: Endpoint
) -> None:
    other = project(tmp_path / "other", target, {"url": endpoint.url, "model_name": "llama"}, engine="vllm")
    with pytest.raises(UserError, match=r"serves \['tiny'\], not 'llama': set serve.model_name"):
        other.run(sampling)
    long = project(tmp_path / "long", target, {"url": endpoint.url}, engine="vllm")
    long.settings["families"]["tiny"]["extract"]["max_length_tokens"] = LIMIT + 1
    long.params = parse_params(long.settings)
    with pytest.raises(UserError, match=f"context of {LIMIT} tokens, {LIMIT + 1} are needed"):
        long.run(sampling)


def servers() -> set[int]:
    """Ids of the vLLM servers below this process, their supervisors and workers left out."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "vllm.entrypoints.openai.api_server" in process.cmdline()[:4]:
                found.add(process.pid)
    return found
