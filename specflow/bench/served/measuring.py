"""The benchmark through inference servers: target alone against target + draft, by concurrency, block by block.

One server runs at a time and blocks alternate A B B A: side by side an idle server would hold memory that the other
one then lacks, and on a CPU its cores. A block is every request once through at one concurrency. Finished blocks
survive a kill. Servers that somebody else runs are used at their URLs, in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from tqdm import tqdm

from specflow import files, http
from specflow.bench.served import metrics
from specflow.bench.served.client import Asking, Reply, Request, run_block
from specflow.bench.served.gap import check_template
from specflow.bench.served.metrics import Block, ServedRecord
from specflow.config import Family
from specflow.config_bench import BenchServe
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.results.served import Check, Server, Servers, Side
from specflow.resume import code_digest, versions
from specflow.serving.engines import Launch, find_install
from specflow.serving.family import child_server
from specflow.serving.server import Endpoint, attach, check_context
from specflow.targets.model import TargetFacts

ROUNDS = 4
"""Requests of each user in a block, at least: the end of a block, where fewer are in flight, must weigh little."""
WARM_UP_TOKENS = 16
SIDES: tuple[Side, Side] = ("baseline", "draft")
NO_PREFIX_CACHE = {"vllm": "--no-enable-prefix-caching", "sglang": "--disable-radix-cache"}
"""The same prompts come again and again: with a prefix cache only the first block would pay for them."""
SPECULATIVE = ("--speculative", "--spec-", "--per-request-spec")
"""Beginnings of flags that only a server with a draft takes."""
SETTLE_S = 0.1
"""Between two readings of counters that must be the same."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    name: str
    family: Family
    paths: Paths
    facts: TargetFacts
    serve: BenchServe
    requests: list[Request]
    num_speculative_tokens: int

    @property
    def asking(self) -> Asking:
        bench = self.family.bench
        return Asking(
            engine=self.serve.engine,
            max_new_tokens=bench.max_new_tokens,
            temperature=bench.temperature,
            seed=bench.seed,
            eos_ids=tuple(self.facts.eos_token_ids),
            timeout_s=self.family.serve.request_timeout_s,
        )


@dataclass
class Running:
    """A server that answers."""

    endpoint: Endpoint
    check: Callable[[], None]
    """Raises where it has ended by itself."""
    about: Server


def check_possible(family: Family, name: str, paths: Paths, serve: BenchServe) -> None:
    """Raise UserError for what would end the benchmark after hours: no engine, one server, synthetic acceptance."""
    refuse_synthetic(family.serve.extra_args, dict(os.environ))
    if serve.baseline_url is None:
        if family.serve.url is not None:
            raise UserError(
                f"families.{name}.serve.url is one server, and a benchmark takes two: set bench.serve.baseline_url and "
                "bench.serve.draft_url"
            )
        assert serve.engine != "openai", "the schema asks for URLs"
        install = find_install(serve.engine, family.serve, paths.cache)
        if install.draws_wrongly and family.bench.temperature > 0:
            raise UserError(
                f"bench.temperature is {family.bench.temperature}, but {install.engine} {install.version} for CPU "
                "draws wrongly above 0 where it verifies drafts (docs/serving.md): set it to 0, or measure on a GPU"
            )


def refuse_synthetic(words: Sequence[str], environment: dict[str, str]) -> None:
    """Raise UserError where acceptance would be made up, or where both servers would speculate."""
    text = " ".join(words).lower()
    simulated = environment.get("SGLANG_SIMULATE_ACC_LEN", "")
    if "synthetic" in text or (simulated and float(simulated) > 0):
        raise UserError(
            "synthetic acceptance is on (serve.extra_args or SGLANG_SIMULATE_ACC_LEN): its numbers say nothing of the "
            "draft; take it out"
        )
    if any(word.startswith(SPECULATIVE) for word in words):
        raise UserError(
            "serve.extra_args has a flag of speculation, which would go to the target alone too: take it out, the "
            "benchmark sets it for the server with the draft"
        )


def measure(plan: Plan, log: files.RowLog) -> tuple[list[Block], Servers, Check]:
    """All blocks, what is known of each server, and what the server with the draft renders as a prompt.

    `log` holds finished blocks by id. Raises UserError where the servers' builds or flags differ, or nothing works.
    """
    levels = plan.serve.concurrency
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=len(SIDES) * plan.serve.repeats * len(levels), unit="block") as bar,
    ):
        bar.set_description(f"bench@{plan.name}, {plan.serve.engine}")
        running: dict[str, Running] = {}
        for repeat in range(plan.serve.repeats):
            mirrored = repeat % 2 == 1
            for engine in SIDES[::-1] if mirrored else SIDES:
                for concurrency in levels[::-1] if mirrored else levels:
                    key = f"{engine}/{concurrency}/{repeat}"
                    if key not in log.rows:
                        row = _block(_switch(stack, running, engine, plan, log), plan, concurrency)
                        _refuse_useless(_from_log(row, engine, concurrency, repeat, plan))
                        log.append({"id": key, **row})
                    bar.update()
    blocks = [
        _from_log(log.rows[f"{engine}/{concurrency}/{repeat}"], engine, concurrency, repeat, plan)
        for concurrency in levels
        for repeat in range(plan.serve.repeats)
        for engine in SIDES
    ]
    baseline, draft = (Server.model_validate(log.rows[f"server/{engine}"]["about"]) for engine in SIDES)
    check_pair(baseline, draft)
    return blocks, Servers(baseline=baseline, draft=draft), Check(**log.rows["template"]["check"])


def _refuse_useless(block: Block) -> None:
    """Raise UserError where nothing of a block came back; what contradicts itself has raised by now."""
    if not block.answered:
        error = block.records[0].error
        raise UserError(
            f"every request to the server of the {block.engine} failed at {block.concurrency} at once, the first with: "
            f"{error}"
        )


def _switch(
    stack: contextlib.ExitStack, running: dict[str, Running], engine: Side, plan: Plan, log: files.RowLog
) -> Running:
    """The server of `engine`, started where it does not run yet; the other one is stopped before."""
    if engine not in running:
        stack.close()
        running.clear()
        server = stack.enter_context(_server(engine, plan))
        _refuse_other_build(engine, server.about, log)
        _warm_up(server, plan)
        if engine == "draft" and "template" not in log.rows:
            first = next(request for request in plan.requests if request.turn == 0)
            check = check_template(server.endpoint, first, plan.facts, plan.asking.timeout_s)
            log.append({"id": "template", "check": asdict(check)})
        running[engine] = server
    return running[engine]


def _refuse_other_build(engine: Side, about: Server, log: files.RowLog) -> None:
    """Hold a server against those that ran before it, the other side's and those of a run that was killed."""
    for side in SIDES:
        known = log.rows.get(f"server/{side}")
        if known is not None:
            check_pair(Server.model_validate(known["about"]), about)
    if f"server/{engine}" not in log.rows:
        log.append({"id": f"server/{engine}", "about": about.to_json()})


def check_pair(one: Server, other: Server) -> None:
    """Raise UserError unless two servers are of one build and started with the same flags, speculation aside."""
    if one.version != other.version:
        raise UserError(
            f"the servers are of different builds, {one.version} and {other.version}: compare the same build"
        )
    if one.flags != other.flags:
        here, there = (dict(side.flags) for side in (one, other))
        apart = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
        raise UserError(
            f"the servers were started with different flags ({', '.join(apart)}): only those of speculation may differ"
        )


@contextlib.contextmanager
def _server(engine: Side, plan: Plan) -> Iterator[Running]:
    serve, kind = plan.family.serve, plan.serve.engine
    needed = max(len(request.prompt) for request in plan.requests) + plan.family.bench.max_new_tokens
    url = plan.serve.baseline_url if engine == "baseline" else plan.serve.draft_url
    if url is not None:
        endpoint = attach(serve.model_copy(update={"url": url}), serve.model_name or plan.name)
        check_context(endpoint, needed)
        yield Running(endpoint, lambda: None, describe(endpoint, kind, None))
        return
    assert kind != "openai", "the schema asks for URLs"
    started: list[Launch] = []

    def benchmarked(launch: Launch) -> Launch:
        started.append(Launch([*launch.argv, NO_PREFIX_CACHE[kind]], launch.environment))
        return started[0]

    with child_server(
        plan.family,
        plan.name,
        plan.paths,
        engine=kind,
        draft=engine == "draft",
        num_speculative_tokens=plan.num_speculative_tokens,
        log_name=f"bench-{engine}",
        edit=benchmarked,
    ) as server:
        check_context(server.endpoint, needed)
        on_cpu = find_install(kind, serve, plan.paths.cache).on_cpu
        num_gpus = None if on_cpu else serve.tensor_parallel_size * serve.data_parallel_size
        about = describe(server.endpoint, kind, started[0])
        about = about.changed(num_gpus=num_gpus, dtype=serve.dtype or plan.facts.dtype)
        yield Running(server.endpoint, server.check, about)


def describe(endpoint: Endpoint, kind: str, launch: Launch | None) -> Server:
    """Version, flags without those of speculation, command and, of SGLang, K as it counts it (less the root)."""
    dtype, k = None, None
    if kind != "sglang":
        version = (_get(endpoint, "/version") or {}).get("version")
        flags = [("max_model_len", str(endpoint.max_model_len))]
    else:
        info = _get(endpoint, "/get_server_info") or _get(endpoint, "/server_info") or {}
        version, dtype = info.get("version"), info.get("dtype")
        if info.get("speculative_num_draft_tokens"):
            k = int(info["speculative_num_draft_tokens"]) - 1
        told = {key: value for key, value in info.items() if not isinstance(value, (list, dict))}
        told = {key: value for key, value in told.items() if not key.startswith(("speculative", "port", "nccl_port"))}
        flags = sorted((key, str(value)) for key, value in told.items())
    return Server(
        url=None if launch else endpoint.url,
        num_gpus=None,
        dtype=dtype,
        k=k,
        version=version,
        flags=plain_flags(launch) if launch else flags,
        command=_without_keys(launch) if launch else None,
    )


def plain_flags(launch: Launch) -> list[tuple[str, str]]:
    """Flags and environment of a command, less what may differ within a pair: speculation and the port."""
    pairs: list[tuple[str, str]] = sorted(launch.environment.items())
    for word in launch.argv[1:]:
        if word.startswith("-"):
            pairs.append((word, ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]} {word}".strip())
    return sorted(pair for pair in pairs if not pair[0].startswith((*SPECULATIVE, "--port")))


def _without_keys(launch: Launch) -> str:
    words = [*launch.argv]
    for place, word in enumerate(words[:-1]):
        if word == "--api-key":
            words[place + 1] = "***"
    return str(Launch(words, launch.environment))


def _get(endpoint: Endpoint, path: str) -> dict[str, Any] | None:
    try:
        answer = http.get(endpoint.url + path, headers=endpoint.headers, timeout=30.0)
        found = answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _warm_up(server: Running, plan: Plan) -> None:
    """Short requests at every concurrency: what a server compiles or allocates at its first batch is not measured."""
    short = replace(plan.asking, max_new_tokens=min(WARM_UP_TOKENS, plan.asking.max_new_tokens))
    for concurrency in plan.serve.concurrency:
        replies, _ = run_block(server.endpoint, _cycled(plan.requests, concurrency), short, concurrency)
        server.check()
        if all(reply.error for reply in replies):
            raise UserError(f"{server.endpoint.url} answers no request: {replies[0].error}")


def _cycled(requests: Sequence[Request], count: int) -> list[Request]:
    return [requests[i % len(requests)] for i in range(count)]


def passes(num_requests: int, concurrency: int) -> int:
    """How often a block goes through the requests."""
    return -(-max(num_requests, ROUNDS * concurrency) // num_requests)


def _block(server: Running, plan: Plan, concurrency: int) -> dict[str, Any]:
    requests = [*plan.requests] * passes(len(plan.requests), concurrency)
    before = _counters(server.endpoint)
    replies, wall_s = run_block(server.endpoint, requests, plan.asking, concurrency)
    server.check()  # a server that died gave errors that are not the draft's
    counters = metrics.differenced(before, _counters(server.endpoint))
    return {"wall_s": wall_s, "counters": counters, "replies": [vars(reply) for reply in replies]}


def _counters(endpoint: Endpoint) -> dict[str, float] | None:
    """Speculation counters once they stand still: an answer may be out before its last step is counted."""
    last = None
    for _ in range(10):
        try:
            answer = http.get(f"{endpoint.url}/metrics", headers=endpoint.headers, timeout=30.0)
        except httpx.HTTPError:
            return None
        found = metrics.parse_counters(answer.text) if answer.status_code == 200 else None
        if found is None or found == last:
            return found
        last = found
        time.sleep(SETTLE_S)
    return last


def _from_log(row: dict[str, Any], engine: Side, concurrency: int, repeat: int, plan: Plan) -> Block:
    count = len(plan.requests)
    rounds = passes(count, concurrency)
    records = [
        _record(Reply(**reply), plan.requests[i % count], engine, concurrency, repeat * rounds + i // count, plan)
        for i, reply in enumerate(row["replies"])
    ]
    return Block(engine, concurrency, repeat, row["wall_s"], records, row["counters"])


def _record(reply: Reply, request: Request, engine: str, concurrency: int, repeat: int, plan: Plan) -> ServedRecord:
    num_tokens = len(reply.token_ids) if reply.token_ids is not None else reply.num_tokens
    error = reply.error
    if error is None and not num_tokens:
        error = "neither token ids nor a usage count came back"
    return ServedRecord(
        set=request.set,
        question_id=request.question_id,
        category=request.category,
        turn=request.turn,
        repeat=repeat,
        engine=engine,
        concurrency=concurrency,
        num_prompt_tokens=len(request.prompt),
        server_prompt_tokens=reply.prompt_tokens,
        num_tokens=num_tokens,
        token_ids=reply.token_ids,
        text=reply.text if reply.token_ids is None else None,
        steps=_steps(reply, num_tokens, engine, plan) if error is None else None,
        started_s=reply.started_s,
        chunk_s=reply.chunk_s,
        finish_reason=reply.finish_reason,
        error=error,
    )


def _steps(reply: Reply, num_tokens: int, engine: str, plan: Plan) -> list[list[int]] | None:
    if engine == "baseline":
        if reply.speculation and reply.speculation.get("num_spec_steps", reply.speculation.get("spec_verify_ct")):
            raise UserError("the server of the target alone speculates: start it without a draft")
        return [[0, 0]] * (num_tokens - 1)
    k = plan.num_speculative_tokens
    if plan.serve.engine == "sglang":
        return metrics.sglang_steps(reply.speculation, num_tokens, k)
    if reply.speculation and reply.speculation["num_spec_tokens"] != k:
        raise UserError(
            f"the server drafts {reply.speculation['num_spec_tokens']} tokens a step, the benchmark in process {k}: "
            "start it with the same number"
        )
    return metrics.vllm_steps(reply.speculation, num_tokens)


def log_parts(plan: Plan, draft_digest: str) -> dict[str, Any]:
    """Blocks are kept across a kill only for the same code, questions, settings, draft and machine."""
    return {
        "code": code_digest(plan.paths.root, "bench"),
        "versions": versions(),
        "target": plan.facts.identity,
        "inputs": {"prompts": [request.prompt for request in plan.requests], "draft": draft_digest},
        "settings": {
            "serve": plan.family.serve.model_dump(mode="json", exclude={"speculative"}),
            "bench": plan.serve.model_dump(mode="json"),
            "asking": json.loads(json.dumps(vars(plan.asking))),
            "k": plan.num_speculative_tokens,
        },
        "machine": os.uname().nodename,
    }
