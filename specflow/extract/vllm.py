"""Capture through vLLM: its `extract_hidden_states` method runs the target and writes each row's states to a file.

Every row is one request for one token; the file that the engine's connector leaves is read, deleted and handed on in
the order of the plan, so the store that results is the transformers engine's but for rounding. Rows whose states came
with their answers (`parked.py`) are not asked for; where that is all of them, no server starts. Works with vLLM 0.32.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from specflow import http
from specflow.errors import RetryableError, UserError
from specflow.extract.engine_files import roomy, scratch_folder, wait_until_written
from specflow.extract.final_norm import load_final_norm
from specflow.extract.parked import ParkedStates
from specflow.extract.vllm_flags import MAX_REQUESTS, Layers, check_settings, file_of, with_capture
from specflow.hidden_states import Captured, PlannedShard, RowInfo, ShardInfo, ShardWriter
from specflow.serving.engines import Install, find_install
from specflow.serving.family import child_server
from specflow.serving.server import Server
from specflow.targets.model import TargetFacts, load_lm_head

if TYPE_CHECKING:
    from pathlib import Path

    from specflow.config import Family, Serve
    from specflow.paths import Paths

CHECKED_ROWS = 8
"""Rows whose final state is held against the token that the engine itself answered."""
CHECK_TOLERANCE = 0.05
"""Of the distance from the mean logit to the largest: what rounding may cost the answered token."""

logger = logging.getLogger("specflow")


@dataclass(frozen=True)
class Answer:
    """One row: states as the store takes them (ids int32 [T], aux [T, A * H], final [T, H], finite bool [T])."""

    states: tuple[Tensor, Tensor, Tensor, Tensor]
    next_token: int
    """What the engine itself answered after the last token, greedily."""


def engine_name(serve: Serve, cache: Path) -> str:
    """Name and version for the manifest. Raises UserError where vLLM is not installed."""
    return f"vllm {find_install('vllm', serve, cache).version}"


def parked_states(family: Family, facts: TargetFacts, paths: Paths, aux_layer_ids: Sequence[int]) -> ParkedStates:
    """Where `sample` leaves the states of its answers and `extract` looks for them."""
    layers = Layers(tuple(aux_layer_ids), facts.num_hidden_layers)
    engine = engine_name(family.serve, paths.cache)
    return ParkedStates(paths, facts, engine, layers.asked, family.serve.extra_args)


def capture(
    name: str,
    family: Family,
    facts: TargetFacts,
    paths: Paths,
    shards: Sequence[PlannedShard],
    tokens_of: dict[str, list[int]],
    folder: Path,
    aux_layer_ids: Sequence[int],
    parked: ParkedStates,
) -> tuple[dict[int, ShardInfo], int]:
    """Write `shards` into `folder`, as `extract.capture` does; return them by number, and how many rows were parked.

    Parked rows are deleted with the shard that they went into.
    """
    settings, layers = family.extract, Layers(tuple(aux_layer_ids), facts.num_hidden_layers)
    rows = [(shard, row) for shard in shards for row in shard.rows]
    serve = check_settings(family.serve, facts, max(row.length for _, row in rows))
    convert = Conversion(layers, load_final_norm(facts, paths.cache), getattr(torch, settings.dtype))
    head_check = HeadCheck(facts, paths.cache)
    budget_tokens = max(settings.batch_tokens, serve.max_model_len or 0, MAX_REQUESTS)
    token_bytes = len(layers.asked) * facts.hidden_size * getattr(torch, facts.dtype).itemsize
    engine = _Engine(
        family.model_copy(update={"serve": serve}),
        name,
        paths,
        find_install("vllm", serve, paths.cache),
        convert,
        budget_tokens,
        folder,
        roomy(2 * budget_tokens * token_bytes, folder.parent),
        f"extract-{shards[0].number}",  # shares have different ones
    )

    def drop(shard: PlannedShard) -> None:
        for row in shard.rows:
            parked.drop(tokens_of[row.id])

    with (
        engine,
        ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="capture") as pool,
        ShardWriter(folder, settings.dtype, written=drop) as writer,
        tqdm(total=sum(row.length for _, row in rows), desc="extract", unit="token", unit_scale=True) as progress,
    ):

        def states_of(row: RowInfo) -> Answer:
            found = parked.get(tokens_of[row.id])
            return engine(row.id, tokens_of[row.id]) if found is None else convert(row.id, tokens_of[row.id], *found)

        try:
            answers = in_order(rows, lambda row: pool.submit(states_of, row), 2 * budget_tokens)
            for shard, row, answer in answers:
                head_check(row.id, answer)
                writer.put(Captured(shard, [row], *answer.states))
                progress.update(row.length)
        finally:
            pool.shutdown(cancel_futures=True)
    return writer.done, len(rows) - engine.asked


@dataclass
class _Engine:
    """The capture's server, which starts when it is first asked for a row. Called from several threads."""

    family: Family
    name: str
    paths: Paths
    install: Install
    convert: Conversion
    budget_tokens: int
    store: Path
    scratch_base: Path
    log_name: str
    asked: int = 0

    def __post_init__(self) -> None:
        self._stack, self._lock = ExitStack(), threading.Lock()
        self._started: Future[_Request] | None = None

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> _Request:
        logger.info(
            "extract: prefix caching and chunked prefill of vLLM are off, one forward takes %d tokens",
            self.budget_tokens,
        )
        enter, timeout_s = self._stack.enter_context, self.family.serve.request_timeout_s
        scratch = enter(scratch_folder(self.store, self.scratch_base))
        server = enter(
            child_server(
                self.family,
                self.name,
                self.paths,
                engine="vllm",
                draft=False,
                log_name=self.log_name,
                edit=lambda launch: with_capture(
                    launch, self.install, self.convert.layers, scratch, self.budget_tokens
                ),
            )
        )
        limits = httpx.Limits(max_connections=MAX_REQUESTS)
        client = enter(http.client(server.endpoint.url, timeout=timeout_s, limits=limits))
        return _Request(server, client, scratch, timeout_s, self.convert)

    def __call__(self, row_id: str, tokens: list[int]) -> Answer:
        with self._lock:
            self.asked += 1
            if self._started is None:  # what goes wrong here is everybody's: nobody tries again
                self._started = Future()
                try:
                    self._started.set_result(self._start())
                except BaseException as error:
                    self._started.set_exception(error)
        return self._started.result()(row_id, tokens)


def in_order(
    rows: Iterable[tuple[PlannedShard, RowInfo]], submit: Callable[[RowInfo], Future[Answer]], limit_tokens: int
) -> Iterator[tuple[PlannedShard, RowInfo, Answer]]:
    """Rows with their states in the order given, of which at most `limit_tokens` (or one row) are asked for ahead."""
    waiting: deque[tuple[PlannedShard, RowInfo, Future[Answer]]] = deque()
    held = 0

    def first() -> tuple[PlannedShard, RowInfo, Answer]:
        shard, row, answer = waiting.popleft()
        return shard, row, answer.result()

    for shard, row in rows:
        while waiting and held + row.length > limit_tokens:
            done = first()
            held -= done[1].length
            yield done
        waiting.append((shard, row, submit(row)))
        held += row.length
    while waiting:
        yield first()


@dataclass
class Conversion:
    """From the engine's tensors to the store's: layers by our ids, the final norm, the store's dtype."""

    layers: Layers
    norm: nn.Module
    dtype: torch.dtype

    @torch.inference_mode()
    def __call__(self, row_id: str, tokens: list[int], found: dict[str, Tensor], next_token: int) -> Answer:
        """A file's tensors as an answer. Raises UserError where they are of other tokens."""
        if found["token_ids"].tolist() != tokens:
            raise UserError(f"vLLM's states of row {row_id} are of other tokens: set extract.engine to transformers")
        aux, last = self.layers.split(found["hidden_states"])
        aux, final = aux.to(self.dtype), self.norm(last).to(self.dtype)
        finite = torch.isfinite(aux).all(-1) & torch.isfinite(final).all(-1)
        return Answer((torch.tensor(tokens, dtype=torch.int32), aux, final, finite), next_token)


class HeadCheck:
    """Of the first rows: the target's head over our final state must choose the token that the engine answered.

    A norm applied wrongly, another layer or the states of a neighbouring token show here, on any target.
    """

    def __init__(self, facts: TargetFacts, cache: Path) -> None:
        self._architecture, self._left = facts.architecture, CHECKED_ROWS
        self._head: Tensor | None = load_lm_head(facts, cache)

    def __call__(self, row_id: str, answer: Answer) -> None:
        """Raises UserError where the answered token's logit is clearly below the largest."""
        if self._head is None:
            return
        logits = (self._head @ answer.states[2][-1].to(self._head.dtype)).float()
        missed, reach = logits.max() - logits[answer.next_token], logits.max() - logits.mean()
        if missed > CHECK_TOLERANCE * reach:
            raise UserError(
                f"row {row_id}: the captured final state does not give the token that vLLM itself answered (logit "
                f"{missed:.3g} below the largest): it treats {self._architecture} otherwise than transformers; set "
                "extract.engine to transformers"
            )
        self._left -= 1
        if self._left == 0:
            self._head = None


@dataclass
class _Request:
    """Asks the server for one row and takes the file that comes of it. Called from several threads."""

    server: Server
    client: httpx.Client
    scratch: Path
    timeout_s: float
    convert: Conversion

    def __call__(self, row_id: str, tokens: list[int]) -> Answer:
        endpoint = self.server.endpoint
        body = {
            "model": endpoint.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "return_token_ids": True,
        }
        try:
            answer = self.client.post(f"{endpoint.url}/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.server.check()
            raise RetryableError(f"extract: no answer for row {row_id} ({type(error).__name__}: {error})") from None
        if answer.status_code != 200:
            self.server.check()
            # 5xx: its engine died, which a second try may mend
            raise (RetryableError if answer.status_code >= 500 else UserError)(
                f"extract: vLLM answers row {row_id} with {answer.status_code}: {' '.join(answer.text.split())[:300]}"
            )
        content = answer.json()
        path = file_of((content.get("kv_transfer_params") or {}).get("hidden_states_path"), self.scratch)
        return self.convert(row_id, tokens, self._take(row_id, path), content["choices"][0]["token_ids"][0])

    def _take(self, row_id: str, path: Path) -> dict[str, Tensor]:
        """Read and delete a file once its writer has let go of the lock."""
        try:
            wait_until_written(path, self.timeout_s)
            found = load_file(path)
        except TimeoutError:
            raise RetryableError(f"extract: vLLM did not finish writing row {row_id}") from None
        except (OSError, SafetensorError) as error:
            self.server.check()
            raise RetryableError(f"extract: vLLM wrote no states of row {row_id} ({error})") from None
        path.unlink()
        return found
