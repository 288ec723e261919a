"""The servers that a stage asks: replicas of our own, kept alive while it runs, or the one at `serve.url`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from specflow.config import Family
from specflow.errors import RetryableError, UserError
from specflow.paths import Paths
from specflow.serving.client import Client, Lane
from specflow.serving.engines import EngineName, Install, Launch
from specflow.serving.family import launch_for
from specflow.serving.server import Endpoint, Server, attach, check_context, free_port, start, wait_until_ready

MAX_RESTARTS = 3
"""Of one replica while a stage runs."""
POLL_S = 0.25

logger = logging.getLogger("specflow")


class Foreign:
    """Somebody else's server, checked before it is used."""

    def __init__(self, family: Family, name: str, needed_tokens: int) -> None:
        endpoint = attach(family.serve, family.serve.model_name or name)
        check_context(endpoint, needed_tokens)
        self.lanes = [Lane(endpoint)]

    async def __aenter__(self) -> Foreign:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def keep(self, client: Client) -> None:
        """Nothing of ours to keep alive."""


class Replicas:
    """`serve.replicas` servers of our own, started together and stopped with the block."""

    def __init__(
        self,
        family: Family,
        name: str,
        paths: Paths,
        *,
        engine: EngineName,
        install: Install,
        needed_tokens: int,
        log_name: str,
        edit: Callable[[Launch], Launch] = lambda launch: launch,
    ) -> None:
        """`edit` changes each command before it runs, as in `child_server`."""
        serve = family.serve
        if serve.max_model_len is not None and serve.max_model_len < needed_tokens:
            raise UserError(
                f"serve.max_model_len = {serve.max_model_len} is below the {needed_tokens} tokens of a conversation: "
                "raise it, or lower extract.max_length_tokens"
            )
        # no longer than needed: a long context takes memory, or does not start at all
        longest = serve.max_model_len or needed_tokens
        self.family = family.model_copy(update={"serve": serve.model_copy(update={"max_model_len": longest})})
        self.name, self.paths, self.engine, self.install, self.log_name = name, paths, engine, install, log_name
        self.edit = edit
        self.devices = _devices(family, name)
        self.lanes: list[Lane] = []
        self._servers: dict[int, Server] = {}

    async def __aenter__(self) -> Replicas:
        numbers = range(self.family.serve.replicas)
        try:
            endpoints = await asyncio.gather(*(self._start(number, self._log(number)) for number in numbers))
        except BaseException:
            await self._stop()
            raise
        self.lanes = [Lane(endpoint, owned=True) for endpoint in endpoints]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def keep(self, client: Client) -> None:
        """Start whichever server dies or hangs again, until cancelled. Raises RetryableError where one keeps dying."""
        async with asyncio.TaskGroup() as group:
            for number in range(len(self.lanes)):
                group.create_task(self._keep(number, client))

    async def _keep(self, number: int, client: Client) -> None:
        lane, restarts = self.lanes[number], 0
        while True:
            await asyncio.sleep(POLL_S)
            server = self._servers[number]
            if server.process.poll() is None and not lane.broken:
                continue
            why = server.why_ended() or lane.last_error
            lane.give_up(why)
            if restarts == MAX_RESTARTS:
                raise RetryableError(
                    f"server {number} was lost {restarts + 1} times ({why}): what is finished is kept; see {server.log}"
                )
            restarts += 1
            logger.warning("server %d is lost (%s): start %d of %d", number, why, restarts, MAX_RESTARTS)
            await asyncio.to_thread(server.stop)
            try:
                endpoint = await self._start(number, self._log(number, f"-restart{restarts}"))
            except UserError as error:  # it has run before: nothing is wrong with the request
                raise RetryableError(f"server {number} could not be started again: {error}") from None
            client.restore(lane, endpoint)

    async def _start(self, number: int, log: Path) -> Endpoint:
        ports = {server.port for server in self._servers.values()}
        port = next(port for port in iter(free_port, None) if port not in ports)
        command = launch_for(
            self.family, self.name, self.paths, engine=self.engine, port=port, draft=False, install=self.install
        )
        if self.devices is not None:
            command = Launch(command.argv, {**command.environment, "CUDA_VISIBLE_DEVICES": self.devices[number]})
        command = self.edit(command)
        server = start(command, port=port, model=self.family.serve.model_name or self.name, log=log)
        self._servers[number] = server
        # in a thread, as it polls; it ends as soon as the server is stopped
        await asyncio.to_thread(wait_until_ready, server, self.family.serve.start_timeout_s)
        return server.endpoint

    def _log(self, number: int, suffix: str = "") -> Path:
        return self.paths.servers / f"{self.log_name}-{number}{suffix}.log"

    async def _stop(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self._servers.values()))


def _devices(family: Family, name: str) -> list[str] | None:
    """Of the GPUs that this process holds, those of each replica; None where it holds none or they are not named."""
    serve = family.serve
    held = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    each = serve.tensor_parallel_size * serve.data_parallel_size
    if not held:
        return None
    if len(held) < each * serve.replicas:
        raise UserError(
            f"{serve.replicas} servers of {each} GPUs need {each * serve.replicas}, the stage holds {len(held)}: set "
            f"families.{name}.resources.sample.gpus"
        )
    return [",".join(held[each * number : each * (number + 1)]) for number in range(serve.replicas)]


Fleet = Foreign | Replicas
