"""The engine of the `sample` stage that asks inference servers: vLLM, SGLang, or anything OpenAI-compatible.

Our own chat template renders every prompt and the server is sent token ids; token ids come back and are kept as they
are. Conversations run side by side and end in any order. Rows have the shape of the in-process engine's, and greedy
ones its content where the server computes in the same dtype.
"""

from __future__ import annotations

import asyncio
import importlib
import queue
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, cast

from specflow.errors import UserError
from specflow.sample.dialogue import Conversation, Dialogue, Turns
from specflow.serving.client import Client, Completion, Lane, Protocol, Request, engine_version, for_each, no_token_ids
from specflow.serving.engines import Launch, find_install
from specflow.serving.fleet import Fleet, Foreign, Replicas
from specflow.targets import template

if TYPE_CHECKING:
    from specflow.config import Family, Serve
    from specflow.paths import Paths
    from specflow.targets.model import TargetFacts

ENGINES = ("vllm", "sglang", "openai")
Put = Callable[[Any], None]


class States(typing.Protocol):
    """What keeps the hidden states of answers: `answer_states.py`."""

    serve: Serve
    """Settings of servers that hand them out."""

    def edit(self, command: Launch) -> Launch: ...

    async def discard(self, completion: Completion) -> None:
        """The states of an answer, which are not those of a whole row."""

    async def keep(self, rows: list[dict[str, Any]], client: Client) -> dict[str, int]:
        """Keep those of finished rows; counts that go with the conversation into the log."""


def identity(family: Family, paths: Paths) -> dict[str, Any]:
    """What of the server settings the rows depend on, as far as it is known before a server has answered."""
    serve = family.serve
    if serve.url is not None:
        return {"model": serve.model_name, "retokenise": serve.retokenise}  # the same server may move
    install = find_install(cast(Any, family.sample.engine), serve, paths.cache)
    return {"version": install.version, "dtype": serve.dtype, "extra_args": serve.extra_args}


def complete(
    conversations: Sequence[Conversation],
    *,
    family: Family,
    name: str,
    paths: Paths,
    facts: TargetFacts,
    turns: Turns,
    log_name: str = "sample",
) -> Iterator[dict[str, Any]]:
    """As `generation.complete`, with `engine` in the rows: {"id", "rows"} of each conversation as it is completed.

    "refused" is in it where a filter of the server ended the conversation; it then ends before that answer. A server of
    ours that dies is started again. Raises RetryableError where a server stays away, UserError for what the user can
    mend. Answers sampled at a temperature above 0 are the server's own draws: not those of the in-process engine.
    """
    if not conversations:
        return
    protocol = cast(Protocol, family.sample.engine)
    dialogues = [turns.begin(conversation) for conversation in conversations]
    dialogues.sort(key=lambda dialogue: (-turns.expected_tokens(dialogue), dialogue.conversation.id))
    with ExitStack() as stack:
        states: States | None = None
        if family.sample.keep_states:
            # by name: what is answered does not depend on how its states are kept
            keeping = importlib.import_module("specflow.answer_states").keeping
            lengths = [turns.expected_tokens(dialogue) for dialogue in dialogues]
            states = cast(States, stack.enter_context(keeping(family, facts, paths, turns.max_length_tokens, lengths)))
            family = family.model_copy(update={"serve": states.serve})
        fleet: Fleet
        if family.serve.url is not None:
            fleet = Foreign(family, name, turns.max_length_tokens)
        else:
            assert protocol != "openai"  # the schema asks for a url
            fleet = Replicas(
                family,
                name,
                paths,
                engine=protocol,
                install=find_install(protocol, family.serve, paths.cache),
                needed_tokens=turns.max_length_tokens,
                log_name=log_name,
                edit=(lambda command: command) if states is None else states.edit,
            )
        yield from _in_thread(lambda put: _answer_all(put, dialogues, family, facts, turns, fleet, protocol, states))


async def _answer_all(
    put: Put,
    dialogues: Sequence[Dialogue],
    family: Family,
    facts: TargetFacts,
    turns: Turns,
    fleet: Fleet,
    protocol: Protocol,
    states: States | None,
) -> None:
    serve = family.serve
    async with fleet:
        lanes: list[Lane] = fleet.lanes
        engine = await asyncio.to_thread(engine_version, lanes[0].endpoint, protocol)
        ask_token_ids = not serve.retokenise
        async with Client(lanes, protocol, timeout_s=serve.request_timeout_s, ask_token_ids=ask_token_ids) as client:

            async def answer(dialogue: Dialogue) -> None:
                done = await _converse(dialogue, client, facts, turns, serve.retokenise, states)
                if states is not None:
                    done |= await states.keep(done["rows"], client)
                put({**done, "rows": [{**row, "engine": engine} for row in done["rows"]]})

            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(fleet.keep(client))
                await for_each(dialogues, answer, family.sample.concurrency)
                keeper.cancel()


async def _converse(
    dialogue: Dialogue, client: Client, facts: TargetFacts, turns: Turns, retokenise: bool, states: States | None
) -> dict[str, Any]:
    """All turns of one conversation, each with the ones before it as its prompt."""
    while True:
        room = dialogue.answer_limit - dialogue.answer_start
        completion = await client.complete(
            Request(
                dialogue.tokens,
                room,
                dialogue.conversation.temperature,
                dialogue.answer_seed % 2**31,
                facts.eos_token_ids,
            )
        )
        if states is not None:
            await states.discard(completion)
        if completion.finish_reason == "refused":
            return {**dialogue.finish(), "refused": 1}
        about = {}
        if completion.token_ids is None:
            if not retokenise:
                raise no_token_ids(client.lanes[0].endpoint)
            token_ids, about = _tokenised(completion, turns, room)
        else:
            token_ids = completion.token_ids
            _check(token_ids, completion, room, facts, dialogue, client.lanes[0])
        dialogue.tokens = [*dialogue.tokens, *token_ids]
        if done := turns.close(dialogue, **about):
            return done


def _check(
    token_ids: list[int], completion: Completion, room: int, facts: TargetFacts, dialogue: Dialogue, lane: Lane
) -> None:
    """The answer is one that the target itself could have ended so."""
    url, of = lane.endpoint.url, dialogue.conversation.id
    if not 0 < len(token_ids) <= room:
        raise UserError(
            f"{url} answered {of} with {len(token_ids)} tokens, 1 to {room} were asked for: no server to sample from"
        )
    if completion.finish_reason == "stop" and token_ids[-1] not in facts.eos_token_ids:
        raise UserError(
            f"{url} stopped its answer to {of} at token {token_ids[-1]}, which is no end token of the target "
            f"({facts.eos_token_ids}): it has stop words or end tokens of its own, or leaves the end token out"
        )
    if max(token_ids) >= facts.vocab_size:
        raise UserError(
            f"{url} answered {of} with token {max(token_ids)}, the target has {facts.vocab_size}: another model"
        )


def _tokenised(completion: Completion, turns: Turns, room: int) -> tuple[list[int], dict[str, str]]:
    """Tokens of an answer's text, and whether they read as that text again; they need not be the generated ones."""
    token_ids = template.encode(turns.tokenizer, completion.text)
    same = turns.tokenizer.decode(token_ids, skip_special_tokens=True) == completion.text
    if completion.finish_reason == "stop":
        if turns.end_of_turn is None:
            raise UserError(
                "serve.retokenise: the chat template puts no end token behind an answer, so none can be added"
            )
        token_ids = [*token_ids, turns.end_of_turn]
    if not token_ids:
        raise UserError("serve.retokenise: an answer is empty though it did not end by itself: nothing to sample")
    return token_ids[:room], {"round_trip": "same" if same else "differs"}


def _in_thread(work: Callable[[Put], Awaitable[None]]) -> Iterator[Any]:
    """What `work` puts, as it comes. Its exception is raised here; closing the iterator cancels it and waits for it.

    The event loop has a thread of its own, so that requests go on while a row is written and signals reach us.
    """
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    runner = asyncio.Runner()
    loop = runner.get_loop()
    task = loop.create_task(cast(Any, work(results.put)))

    def run() -> None:
        try:
            loop.run_until_complete(task)
            results.put(_Ended(None))
        except BaseException as error:
            results.put(_Ended(error))
        finally:
            runner.close()

    thread = threading.Thread(target=run, name="served")
    thread.start()
    try:
        while not isinstance(item := results.get(), _Ended):
            yield item
        if item.error is not None:
            raise _leaf(item.error) from None
    finally:
        with suppress(RuntimeError):  # the loop is closed once all is done
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


class _Ended:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _leaf(error: BaseException) -> BaseException:
    """The first exception of those that a task group collects."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
