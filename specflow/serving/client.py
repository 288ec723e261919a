"""The client of inference servers: a prompt of token ids in, the generated token ids out.

The least busy of several servers is asked; each request has a deadline; what may pass is tried again with exponential,
jittered backoff; a server that fails again and again is not asked any more. Knows three protocols and nothing of
conversations. Request and answer shapes: vLLM 0.32 (vllm/entrypoints/openai/completion/protocol.py), SGLang's native
/generate (docs: basic_usage/native_api, sampling_params; srt/managers/tokenizer_manager.py), OpenAI's /v1/completions.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx

from specflow import http
from specflow.errors import RetryableError, UserError
from specflow.serving.server import Endpoint

Protocol = Literal["vllm", "sglang", "openai"]
T = TypeVar("T")

MAX_ATTEMPTS = 7
"""Of one request; the waits between them make about half a minute."""
MAX_TIMEOUTS = 2
"""Deadlines that one request may miss."""
BREAKER_FAILURES = 7
"""Failures of a server in a row, after which it is not asked any more."""
BACKOFF_S, MAX_BACKOFF_S = 0.5, 16.0
MAX_RETRY_AFTER_S = 60.0
MAY_PASS = frozenset({429, 500, 502, 503, 504})
"""500 too: vLLM answers it to an error of one request that a second try may not meet, and with its last breath."""


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float
    """0 is greedy; nothing else shapes the distribution, whatever defaults the server has."""
    seed: int
    """Below 2**31, as not every server takes more."""
    stop_token_ids: Sequence[int]


@dataclass(frozen=True)
class Completion:
    token_ids: list[int] | None
    """With the end token, where there is one. None: the server returns none."""
    text: str
    finish_reason: Literal["stop", "length", "refused"]
    """`refused`: a filter of the server ended or suppressed the answer."""
    states_file: str | None = None
    """Where vLLM wrote hidden states, if it was started to."""
    cached_tokens: int = 0
    """Of the prompt, those that the server says it had not to compute."""


class _MayPass(Exception):
    """A failure that a second try may not meet."""

    def __init__(self, why: str, *, lost: bool = False, timeout: bool = False, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.lost, self.timeout, self.after_s = lost, timeout, after_s


@dataclass(eq=False)
class Lane:
    """One server as the client sees it."""

    endpoint: Endpoint
    owned: bool = False
    """A child of ours: once broken, somebody starts it again and calls `Client.restore`."""
    in_flight: int = 0
    failures: int = 0
    """In a row; requests that were under way together count once."""
    failed_at: float = 0.0
    retry_at: float = 0.0
    answered_at: float = 0.0
    restarts: int = 0
    last_error: str = ""

    @property
    def broken(self) -> bool:
        return self.failures >= BREAKER_FAILURES

    def give_up(self, why: str) -> None:
        self.failures, self.last_error = BREAKER_FAILURES, why


class Client:
    """Used as `async with`; `complete` may be called by many tasks at once, `for_each` bounds how many."""

    def __init__(
        self, lanes: Sequence[Lane], protocol: Protocol, *, timeout_s: float, ask_token_ids: bool = True
    ) -> None:
        self.lanes, self.protocol, self.timeout_s = list(lanes), protocol, timeout_s
        self.ask_token_ids = ask_token_ids
        self._restored = asyncio.Event()

    async def __aenter__(self) -> Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = http.async_client(*(lane.endpoint.url for lane in self.lanes), limits=limits, timeout=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(self, request: Request) -> Completion:
        """Raises UserError where the server refuses the request, RetryableError where it stays away."""
        attempts = timeouts = 0
        restarts = self._num_restarts()
        while True:
            lane = await self._choose()
            if restarts != self._num_restarts():  # another server: what its predecessor failed is not counted
                attempts, timeouts, restarts = 0, 0, self._num_restarts()
            started, generation = time.monotonic(), lane.restarts
            lane.in_flight += 1
            try:
                completion = await self._ask(lane.endpoint, request)
            except _MayPass as error:
                failure = error
            else:
                lane.failures, lane.answered_at = 0, time.monotonic()
                return completion
            finally:
                lane.in_flight -= 1
            attempts, timeouts = attempts + 1, timeouts + failure.timeout
            if lane.restarts != generation:
                continue
            if failure.lost:
                _count_failure(lane, failure, started)
            if timeouts >= MAX_TIMEOUTS and lane.answered_at > started:
                raise UserError(
                    f"{failure} to a request for {request.max_new_tokens} tokens, while others were answered: raise it "
                    "or lower sample.concurrency or sample.max_new_tokens"
                )
            if timeouts >= MAX_TIMEOUTS or attempts >= MAX_ATTEMPTS:
                if not (lane.owned and failure.lost):
                    raise _stays_away(lane.endpoint, str(failure))
                lane.give_up(str(failure))
            await asyncio.sleep(max(failure.after_s, _backoff_s(attempts)))

    def restore(self, lane: Lane, endpoint: Endpoint) -> None:
        """The lane's server was started again, maybe elsewhere."""
        lane.endpoint, lane.failures, lane.retry_at = endpoint, 0, 0.0
        lane.restarts += 1
        self._restored.set()

    def _num_restarts(self) -> int:
        return sum(lane.restarts for lane in self.lanes)

    async def _choose(self) -> Lane:
        """The least busy server that may be asked, waiting for one if need be."""
        while True:
            now = time.monotonic()
            whole = [lane for lane in self.lanes if not lane.broken]
            if ready := [lane for lane in whole if lane.retry_at <= now]:
                return min(ready, key=lambda lane: lane.in_flight)
            if whole:
                await asyncio.sleep(min(lane.retry_at for lane in whole) - now)
            elif any(lane.owned for lane in self.lanes):
                self._restored.clear()
                await self._restored.wait()
            else:
                lane = self.lanes[0]
                raise _stays_away(lane.endpoint, f"{lane.failures} failures in a row, the last: {lane.last_error}")

    async def _ask(self, endpoint: Endpoint, request: Request) -> Completion:
        path, body = _body(self.protocol, endpoint.model, request, self.ask_token_ids)
        try:
            async with asyncio.timeout(self.timeout_s):
                answer = await self._http.post(endpoint.url + path, json=body, headers=endpoint.headers)
        except TimeoutError:
            raise _MayPass(
                f"no answer within serve.request_timeout_s = {self.timeout_s:g} s", lost=True, timeout=True
            ) from None
        except httpx.TransportError as error:
            raise _MayPass(f"{type(error).__name__}: {_one_line(error) or 'no more said'}", lost=True) from None
        if answer.status_code in MAY_PASS:
            why = f"status {answer.status_code}: {_one_line(answer.text)}"
            raise _MayPass(why, lost=answer.status_code in (502, 503, 504), after_s=_retry_after_s(answer))
        if answer.status_code != 200:
            raise _refusal(endpoint, path, answer)
        try:
            read = _read_sglang if self.protocol == "sglang" else _read_openai
            return read(answer.json(), len(request.prompt), endpoint)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{endpoint.url}{path} answers 200 with something else than a completion ({_one_line(answer.text)}): "
                f"it does not speak the protocol {self.protocol!r}"
            ) from None


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """`work` on every item, `concurrency` of them at a time and in their order; the first exception ends all."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:  # all workers draw from one iterator
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


def engine_version(endpoint: Endpoint, protocol: Protocol) -> str:
    """What the server says it is, such as `vllm 0.32.0`. An unknown kind of server has no version to ask for.

    vLLM has GET /version; SGLang GET /server_info, in older versions /get_server_info.
    """
    paths = {"vllm": ("/version",), "sglang": ("/server_info", "/get_server_info"), "openai": ()}[protocol]
    for path in paths:
        try:
            answer = http.get(endpoint.url + path, headers=endpoint.headers, timeout=30.0)
            if answer.status_code == 200:
                return f"{protocol} {answer.json()['version']}"
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            continue
    if paths:
        raise UserError(
            f"{endpoint.url}{paths[0]} tells no version: it is no {protocol} server; use sample.engine: openai"
        )
    return "openai, version unknown"


def _body(protocol: Protocol, model: str, request: Request, ask_token_ids: bool) -> tuple[str, dict[str, Any]]:
    """Path and body. Every knob that a model's generation_config may set is set back: greedy must be greedy."""
    if protocol == "sglang":
        # ignore_eos would switch the stop tokens off with it
        params = {
            "max_new_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(request.stop_token_ids),
            "sampling_seed": request.seed,
        }
        return "/generate", {"input_ids": list(request.prompt), "sampling_params": params, "stream": False}
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": 1.0,
        "seed": request.seed,
    }
    if protocol == "vllm":
        body |= {
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # the target's end tokens as fetch recorded them, and no others
            "ignore_eos": True,
            "stop_token_ids": list(request.stop_token_ids),
        }
    if protocol == "vllm" or ask_token_ids:
        body["return_token_ids"] = True
    return "/v1/completions", body


def _read_openai(answer: dict[str, Any], num_prompt_tokens: int, endpoint: Endpoint) -> Completion:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    _check_prompt(usage.get("prompt_tokens"), num_prompt_tokens, endpoint)
    return Completion(
        choice.get("token_ids"),
        choice["text"] or "",
        _finish(choice["finish_reason"], endpoint),
        (answer.get("kv_transfer_params") or {}).get("hidden_states_path"),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def _read_sglang(answer: dict[str, Any], num_prompt_tokens: int, endpoint: Endpoint) -> Completion:
    about = answer["meta_info"]
    reason, token_ids = about["finish_reason"], answer.get("output_ids")
    _check_prompt(about.get("prompt_tokens"), num_prompt_tokens, endpoint)
    matched = reason.get("matched")
    if token_ids is not None and reason["type"] == "stop" and isinstance(matched, int) and token_ids[-1:] != [matched]:
        token_ids = [*token_ids, matched]
    finish = _finish(reason["type"], endpoint, reason.get("message") or "")
    return Completion(token_ids, answer.get("text") or "", finish)


def _finish(reason: Any, endpoint: Endpoint, message: str = "") -> Literal["stop", "length", "refused"]:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    if reason == "content_filter":
        return "refused"
    if reason == "abort":
        raise _MayPass(f"the server aborted the request: {_one_line(message) or 'no reason given'}")
    raise UserError(
        f"{endpoint.url} ended an answer for the reason {reason!r}: specflow knows stop, length and filters"
    )


def _check_prompt(got: int | None, expected: int, endpoint: Endpoint) -> None:
    if got is not None and got != expected:
        raise UserError(
            f"{endpoint.url} counts {got} tokens in a prompt of {expected}: it changes prompts (adds a start token, or "
            "cuts them), so its answers are to something else"
        )


def _count_failure(lane: Lane, failure: _MayPass, started: float) -> None:
    if started < lane.failed_at:
        return  # under way already when the server was seen to fail: the same failure
    lane.failures += 1
    lane.failed_at, lane.last_error = time.monotonic(), str(failure)
    lane.retry_at = lane.failed_at + _backoff_s(lane.failures)


def _backoff_s(failures: int) -> float:
    return min(BACKOFF_S * 2.0 ** (failures - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)


def _retry_after_s(answer: httpx.Response) -> float:
    """The header in its form of seconds; the form of a date is rare and ignored."""
    value = answer.headers.get("retry-after", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isdigit() else 0.0


def _refusal(endpoint: Endpoint, path: str, answer: httpx.Response) -> UserError:
    where, status = f"{endpoint.url}{path}", answer.status_code
    if status in (401, 403):  # without the server's words, which may quote the key
        return UserError(f"{where} refuses the key ({status}): set serve.api_key_env to its variable")
    if status in (404, 405, 501):
        return UserError(f"{where} answers {status}: no such interface there; check sample.engine and serve.url")
    if "return_token_ids" in answer.text:
        return no_token_ids(endpoint)
    return UserError(f"{where} refuses a request ({status}): {_one_line(answer.text)}")


def no_token_ids(endpoint: Endpoint) -> UserError:
    return UserError(
        f"{endpoint.url} returns no token ids: use a server that does (vLLM, SGLang), or set serve.retokenise: true to "
        "tokenise its text, which need not give the tokens that were generated"
    )


def _stays_away(endpoint: Endpoint, why: str) -> RetryableError:
    return RetryableError(
        f"{endpoint.url} gives no answer ({why}): what is finished is kept, run the stage again when the server answers"
    )


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
