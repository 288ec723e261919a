"""The client of inference servers against real HTTP servers on the loopback interface that misbehave on demand.

Recorded shapes: vLLM 0.32 /v1/completions with return_token_ids (tests/vllm/test_sampling.py has the real one); SGLang
/generate as in its docs (basic_usage/native_api) and srt/managers/tokenizer_manager.py, not run on a real server.
"""

import asyncio
import threading
import time

import pytest

from specflow.config import Serve
from specflow.errors import RetryableError, UserError
from specflow.serving import client as client_module
from specflow.serving.client import Client, Completion, Lane, Request, engine_version, for_each
from specflow.serving.server import Endpoint, attach, free_port
from tests.fake_engine import END, answer_of, completion, echo, serving

PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.01)


def request(prompt=PROMPT, max_new_tokens=8):
    return Request(prompt, max_new_tokens, 0.0, 11, [END])


def ask(url, *, protocol="vllm", timeout_s=5.0, count=1, concurrency=1, headers=None, **options):
    """Completions of `count` different prompts; of one, itself."""
    results = {}

    async def main():
        lanes = [Lane(Endpoint(one, "tiny", headers or {})) for one in ([url] if isinstance(url, str) else url)]
        async with Client(lanes, protocol, timeout_s=timeout_s, **options) as client:

            async def work(number):
                results[number] = await client.complete(request([*PROMPT, number]))

            await for_each(range(count), work, concurrency)

    try:
        asyncio.run(main())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return results[0] if count == 1 else [results[number] for number in range(count)]


def failing(times, status=503, body=None):
    """A reply that fails `times` times before it answers."""
    left = [times]

    def reply(path, asked):
        left[0] -= 1
        return echo(path, asked) if left[0] < 0 else (status, body or {"error": {"message": "busy"}})

    return reply


def test_vllm_is_sent_token_ids_and_no_default_of_the_model_shapes_the_draw():
    with serving() as server:
        got = ask(server.url)
    expected = answer_of([*PROMPT, 0], 8)
    assert got == Completion(expected, "", "stop" if expected[-1] == END else "length")
    ((path, body),) = server.seen
    assert path == "/v1/completions" and body["prompt"] == [*PROMPT, 0]
    assert body["return_token_ids"] is True and body["seed"] == 11 and body["max_tokens"] == 8
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert neutral.items() <= body.items()
    assert body["stop_token_ids"] == [END] and body["ignore_eos"] is True


@pytest.mark.parametrize("output_ids", [[9, 10], [9, 10, END]])
def test_sglang_names_the_end_token_beside_the_answer(output_ids):
    answer = {
        "text": "a b",
        "output_ids": output_ids,
        "meta_info": {
            "id": "0e9d2c",
            "finish_reason": {"type": "stop", "matched": END},
            "prompt_tokens": 4,
            "completion_tokens": 3,
            "cached_tokens": 0,
            "e2e_latency": 0.02,
        },
    }
    with serving(lambda path, body: (200, answer)) as server:
        got = ask(server.url, protocol="sglang")
    assert got == Completion([9, 10, END], "a b", "stop")
    ((path, body),) = server.seen
    assert path == "/generate" and body["input_ids"] == [*PROMPT, 0] and body["stream"] is False
    assert body["sampling_params"]["stop_token_ids"] == [END] and body["sampling_params"]["top_k"] == -1
    assert "ignore_eos" not in body["sampling_params"]  # there it switches stop tokens off too


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    with serving(failing(3, status)) as server:
        assert ask(server.url).token_ids == answer_of([*PROMPT, 0], 8)
    assert len(server.seen) == 4


def test_the_server_says_when_to_come_back():
    with serving(failing(1, 429)) as server:
        server.headers_to_send = {"retry-after": "1"}
        started = time.monotonic()
        ask(server.url)
    assert time.monotonic() - started >= 1.0


def test_a_connection_cut_in_the_middle_of_an_answer_is_tried_again():
    with serving(failing(2, 200, b'{"choices": [{"te')) as server:
        assert ask(server.url).token_ids == answer_of([*PROMPT, 0], 8)
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_a_second_try_meets_again_is_not_tried_again(status):
    with (
        serving(failing(9, status, {"error": {"message": "context is\n2048 tokens"}})) as server,
        pytest.raises(UserError) as error,
    ):
        ask(server.url)
    assert len(server.seen) == 1 and type(error.value) is UserError and "\n" not in str(error.value)
    assert "context is\\n2048 tokens" in str(error.value) or status == 404


def test_a_server_that_keeps_failing_is_not_asked_any_more():
    with serving(failing(10**6)) as server, pytest.raises(RetryableError, match=r"gives no answer.*503.*run the stage"):
        ask(server.url, count=40, concurrency=8)
    assert len(server.seen) <= 8 * client_module.MAX_ATTEMPTS


def test_failures_of_requests_that_were_under_way_together_count_once():
    together = threading.Barrier(client_module.BREAKER_FAILURES + 5, timeout=10)
    first = threading.Semaphore(together.parties)

    def reply(path, body):
        if first.acquire(blocking=False):
            together.wait()
            return 503, {}
        return echo(path, body)

    with serving(reply) as server:
        got = ask(server.url, count=together.parties, concurrency=together.parties)
    assert [one.token_ids for one in got] == [answer_of([*PROMPT, n], 8) for n in range(together.parties)]
    assert len(server.seen) == 2 * together.parties


def test_no_server_at_all():
    port = free_port()
    with pytest.raises(RetryableError, match=r"gives no answer \(.*ConnectError"):
        ask(f"http://127.0.0.1:{port}", count=3, concurrency=3)


def test_a_server_that_is_away_for_a_moment_costs_nothing():
    port, results = free_port(), []
    asking = threading.Thread(target=lambda: results.extend(ask(f"http://127.0.0.1:{port}", count=4, concurrency=4)))
    asking.start()
    time.sleep(0.1)
    with serving(port=port):
        asking.join(timeout=20)
    assert [one.token_ids for one in results] == [answer_of([*PROMPT, n], 8) for n in range(4)]


def test_a_hung_server_meets_the_deadline():
    hang = threading.Event()
    with (
        serving(lambda path, body: (hang.wait(20), echo(path, body))[1]) as server,
        pytest.raises(RetryableError, match=r"no answer within serve.request_timeout_s = 0.2 s"),
    ):
        try:
            ask(server.url, timeout_s=0.2)
        finally:
            hang.set()
    assert len(server.seen) == client_module.MAX_TIMEOUTS


def test_a_server_that_is_only_slow_is_not_taken_for_lost():
    hang = threading.Event()

    def reply(path, body):
        if body["prompt"][-1] == 0:
            hang.wait(20)
        time.sleep(0.01)
        return echo(path, body)

    with serving(reply) as server, pytest.raises(UserError, match=r"to a request for 8 tokens, while others") as error:
        try:
            ask(server.url, timeout_s=0.5, count=400, concurrency=2)
        finally:
            hang.set()
    assert not isinstance(error.value, RetryableError)


def test_the_least_busy_server_is_asked():
    others_done = threading.Event()

    def slow(path, body):
        others_done.wait(20)
        return echo(path, body)

    def quick(path, body):
        if len(two.seen) >= 9:
            others_done.set()
        return echo(path, body)

    with serving(slow) as one, serving(quick) as two:
        got = ask([one.url, two.url], count=10, concurrency=2)
    assert (len(one.seen), len(two.seen)) == (1, 9)
    assert [answer.token_ids for answer in got] == [answer_of([*PROMPT, n], 8) for n in range(10)]


def test_concurrency_is_bounded_and_used():
    lock, now, most = threading.Lock(), [0], [0]

    def reply(path, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return echo(path, body)

    with serving(reply) as server:
        ask(server.url, count=20, concurrency=5)
    assert most[0] == 5


def test_a_key_is_sent_and_stands_in_no_message(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serving(lambda path, body: (401, {"error": "Incorrect API key provided: sk-very-secret"})) as server:
        endpoint = attach(Serve(url=server.url, api_key_env="MY_KEY"), "tiny")
        assert endpoint.headers == {"Authorization": "Bearer sk-very-secret"} and "secret" not in repr(endpoint)
        with pytest.raises(UserError, match="refuses the key") as error:
            ask(server.url, headers=endpoint.headers)
    assert "secret" not in str(error.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match=r"serve.api_key_env names MY_KEY, which is not set"):
        attach(Serve(url=server.url, api_key_env="MY_KEY"), "tiny")


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, {"hello": "world"}, "something else than a completion"),
        (200, {"choices": []}, "something else than a completion"),
        (404, {"detail": "Not Found"}, "no such interface there"),
        (400, {"error": {"message": "Unrecognized request argument: return_token_ids"}}, "returns no token ids"),
        (200, completion([5, END], "stop", 3), "counts 3 tokens in a prompt of 4: it changes prompts"),
        (200, completion([5], "repetition", 4), "for the reason 'repetition'"),
    ],
)
def test_an_endpoint_that_is_no_server_to_sample_from(status, answer, message):
    with serving(lambda path, body: (status, answer)) as server, pytest.raises(UserError, match=message) as error:
        ask(server.url, protocol="openai")
    assert len(server.seen) == 1 and not isinstance(error.value, RetryableError)


def test_token_ids_are_not_asked_for_where_they_are_given_up():
    with serving() as server:
        ask(server.url, protocol="openai", ask_token_ids=False)
    assert not {"return_token_ids", "top_k", "ignore_eos"} & server.seen[0][1].keys()  # OpenAI refuses unknown keys


def test_version_of_the_engine():
    with serving() as server:
        endpoint = Endpoint(server.url, "tiny")
        assert engine_version(endpoint, "vllm") == "vllm 9.9"
        assert engine_version(endpoint, "openai") == "openai, version unknown"
        with pytest.raises(UserError, match="tells no version: it is no sglang server"):
            engine_version(endpoint, "sglang")
