"""Asks a server one block of requests: a fixed number of users, each with one streamed request in flight.

vLLM and any OpenAI-compatible server answer `/v1/completions`, SGLang its own `/generate`, whose last message carries
the speculation counts of the request. Prompts go as token ids, so that no template or tokeniser stands between
the in-process benchmark and this one. A failed request is a record with its error: it is not asked again, because
a retry would hide it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from specflow import http
from specflow.results.served import ServedEngine
from specflow.serving.server import Endpoint


@dataclass(frozen=True)
class Request:
    """A question's turn as every engine gets it."""

    set: str
    question_id: str
    category: str
    turn: int
    prompt: list[int]
    """Token ids, earlier turns and their answers included."""
    text: str
    """The user's own words of this turn."""


@dataclass(frozen=True)
class Asking:
    """What is asked for with every request, the same of both servers."""

    engine: ServedEngine
    max_new_tokens: int
    temperature: float
    seed: int
    eos_ids: tuple[int, ...]
    timeout_s: float


@dataclass
class Reply:
    """What came back of one request; times in seconds since it was sent."""

    started_s: float
    """Since the block began."""
    chunk_s: list[float] = field(default_factory=list)
    """Arrival of each message that held a token."""
    token_ids: list[int] | None = None
    """None where the server sends none."""
    text: str = ""
    num_tokens: int = 0
    prompt_tokens: int | None = None
    """Length of the prompt as the server counts it."""
    speculation: dict[str, Any] | None = None
    """The server's own counts of this request, in its own words."""
    finish_reason: str = ""
    error: str | None = None


def run_block(
    endpoint: Endpoint, requests: Sequence[Request], asking: Asking, concurrency: int
) -> tuple[list[Reply], float]:
    """Replies in the order of `requests`, and the seconds from the first sent to the last answered."""
    return asyncio.run(_run_block(endpoint, requests, asking, concurrency))


async def _run_block(
    endpoint: Endpoint, requests: Sequence[Request], asking: Asking, concurrency: int
) -> tuple[list[Reply], float]:
    replies: list[Reply | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    began = time.perf_counter()

    async def user(client: httpx.AsyncClient) -> None:
        for number in waiting:
            replies[number] = await _ask(client, endpoint, requests[number], asking, time.perf_counter() - began)

    # The deadline of a whole request is asyncio's; httpx alone would wait anew for every message.
    async with http.async_client(endpoint.url, timeout=None, limits=limits, headers=endpoint.headers) as client:
        await asyncio.gather(*(user(client) for _ in range(concurrency)))
    return [reply for reply in replies if reply is not None], time.perf_counter() - began


async def _ask(
    client: httpx.AsyncClient, endpoint: Endpoint, request: Request, asking: Asking, started_s: float
) -> Reply:
    reply = Reply(started_s)
    sent = time.perf_counter()
    body = _body(endpoint.model, request, asking)
    path = "/generate" if asking.engine == "sglang" else "/v1/completions"
    read = _read_sglang if asking.engine == "sglang" else _read_openai
    try:
        async with asyncio.timeout(asking.timeout_s), client.stream("POST", endpoint.url + path, json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode("utf-8", errors="replace")
                reply.error = f"status {answer.status_code}: {' '.join(text.split())[:200]}"
                return reply
            async for message in _messages(answer):
                if message.get("error"):
                    reply.error = f"the server says {' '.join(str(message['error']).split())[:200]}"
                    return reply
                read(reply, message, time.perf_counter() - sent)
    except TimeoutError:
        reply.error = f"no whole answer within request_timeout_s = {asking.timeout_s:g} s"
    except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
        reply.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reply.error is None and (not reply.chunk_s or not reply.finish_reason):
        reply.error = "the stream broke off before the answer's end"
    return reply


def _body(model: str, request: Request, asking: Asking) -> dict[str, Any]:
    """Sampling is stated in full: servers take penalties and top_k from the checkpoint's own generation config."""
    if asking.engine == "sglang":
        return {
            "input_ids": request.prompt,
            "stream": True,
            "sampling_params": {
                "temperature": asking.temperature,
                "max_new_tokens": asking.max_new_tokens,
                "top_p": 1.0,
                "top_k": -1,
                "repetition_penalty": 1.0,
                "stop_token_ids": list(asking.eos_ids),
            },
        }
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": asking.max_new_tokens,
        "temperature": asking.temperature,
        "top_p": 1.0,
        "seed": asking.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asking.engine == "vllm":
        ours = {"top_k": 0, "repetition_penalty": 1.0, "stop_token_ids": list(asking.eos_ids)}
        body |= {**ours, "return_token_ids": True}
    return body


async def _messages(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event up to the end mark."""
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _read_openai(reply: Reply, message: dict[str, Any], at_s: float) -> None:
    """A message of /v1/completions. vLLM's last one has no choice but the usage and the request's own metrics."""
    for choice in message.get("choices") or []:
        ids = choice.get("token_ids")
        if ids:
            reply.token_ids = [*(reply.token_ids or []), *ids]
        if ids or choice.get("text"):
            reply.chunk_s.append(at_s)
        reply.text += choice.get("text") or ""
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    if usage := message.get("usage"):
        reply.num_tokens, reply.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    if metrics := message.get("metrics"):
        reply.speculation = metrics.get("speculative_decoding")


def _read_sglang(reply: Reply, message: dict[str, Any], at_s: float) -> None:
    """A message of /generate: text and counts are those so far; ids too, unless the server streams increments."""
    meta, ids = message["meta_info"], list(message.get("output_ids") or [])
    if meta["completion_tokens"] > reply.num_tokens:
        reply.chunk_s.append(at_s)
    if ids:
        whole = len(ids) == meta["completion_tokens"]
        reply.token_ids = ids if whole else [*(reply.token_ids or []), *ids]
    reply.num_tokens, reply.prompt_tokens = meta["completion_tokens"], meta["prompt_tokens"]
    reply.text = message.get("text") or reply.text
    if finish := meta.get("finish_reason"):
        reply.finish_reason = finish["type"]
        reply.speculation = {key: value for key, value in meta.items() if key.startswith("spec_")} or None
