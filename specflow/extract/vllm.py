"""Capture through vLLM: its `extract_hidden_states` method runs the target and writes each row's states to a file.

Every row is one request for one token; the file that the engine's connector leaves is read, deleted and handed on in
the order of the plan, so the store that results is the transformers engine's but for rounding. Works with vLLM 0.32.
Sources: vllm/v1/spec_decode/extract_hidden_states.py, .../v1/example_hidden_states_connector.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from specflow.errors import RetryableError, UserError
from specflow.extract.final_norm import load_final_norm
from specflow.hidden_states import Captured, PlannedShard, RowInfo, ShardInfo, ShardWriter
from specflow.serving.engines import Install, Launch, find_install
from specflow.serving.family import child_server
from specflow.serving.server import Server
from specflow.targets.model import TargetFacts, load_lm_head

if TYPE_CHECKING:
    from specflow.config import Family, Serve
    from specflow.paths import Paths

PLUGIN = Path(__file__).parents[1] / "serving" / "vllm_plugin"
"""Folder put on the engine's PYTHONPATH; all it holds is the connector."""
SHARED_MEMORY = Path("/dev/shm")
MAX_REQUESTS = 64
"""In flight at once; by tokens, rows wait sooner."""
WAIT_S = 0.002
CHECKED_ROWS = 8
"""Rows whose final state is held against the token that the engine itself answered."""
CHECK_TOLERANCE = 0.05
"""Of the distance from the mean logit to the largest: what rounding may cost the answered token."""
_FORBIDDEN = {"enable-prefix-caching", "enable-chunked-prefill", "speculative-config", "kv-transfer-config", "sc"}

logger = logging.getLogger("specflow")


@dataclass(frozen=True)
class Answer:
    """One row: states as the store takes them (ids int32 [T], aux [T, A * H], final [T, H], finite bool [T])."""

    states: tuple[Tensor, Tensor, Tensor, Tensor]
    next_token: int
    """What the engine itself answered after the last token, greedily."""


@dataclass(frozen=True)
class Layers:
    """Which streams the engine is asked for, and where they lie in what it answers: the one place that translates.

    Our ids are vLLM's (residual after k layers, 0 = embeddings). Its id n is the last stream, before the final norm.
    """

    aux_layer_ids: tuple[int, ...]
    num_hidden_layers: int

    @property
    def asked(self) -> list[int]:
        """Ascending and without repetition, as the engine orders its answer."""
        return sorted({*self.aux_layer_ids, self.num_hidden_layers})

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [T, L, H] of an answer -> aux [T, A * H] and the stream before the final norm [T, H]."""
        place = {layer: index for index, layer in enumerate(self.asked)}
        aux = states[:, [place[layer] for layer in sorted(self.aux_layer_ids)]].flatten(1)
        return aux, states[:, place[self.num_hidden_layers]]


def engine_name(serve: Serve, cache: Path) -> str:
    """Name and version for the manifest. Raises UserError where vLLM is not installed."""
    return f"vllm {find_install('vllm', serve, cache).version}"


def capture(
    name: str,
    family: Family,
    facts: TargetFacts,
    paths: Paths,
    shards: Sequence[PlannedShard],
    tokens_of: dict[str, list[int]],
    folder: Path,
    aux_layer_ids: Sequence[int],
) -> dict[int, ShardInfo]:
    """Write `shards` into `folder`, as `extract.capture` does; return them by number."""
    settings, layers = family.extract, Layers(tuple(aux_layer_ids), facts.num_hidden_layers)
    rows = [(shard, row) for shard in shards for row in shard.rows]
    longest = max(row.length for _, row in rows)
    serve = check_settings(family.serve, facts, longest)
    install = find_install("vllm", serve, paths.cache)
    convert = Conversion(layers, load_final_norm(facts, paths.cache), getattr(torch, settings.dtype))
    head_check = HeadCheck(facts, paths.cache)
    budget_tokens = max(settings.batch_tokens, serve.max_model_len or 0, MAX_REQUESTS)
    token_bytes = len(layers.asked) * facts.hidden_size * getattr(torch, facts.dtype).itemsize
    logger.info(
        "extract: prefix caching and chunked prefill of vLLM are off, one forward takes %d tokens", budget_tokens
    )
    with (
        scratch_folder(folder, 2 * budget_tokens * token_bytes) as scratch,
        child_server(
            family.model_copy(update={"serve": serve}),
            name,
            paths,
            engine="vllm",
            draft=False,
            log_name=f"extract-{shards[0].number}",  # shares have different ones
            edit=lambda command: with_capture(command, install, layers, scratch, budget_tokens),
        ) as server,
        ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="capture") as pool,
        httpx.Client(timeout=serve.request_timeout_s, limits=httpx.Limits(max_connections=MAX_REQUESTS)) as client,
        ShardWriter(folder, settings.dtype) as writer,
        tqdm(total=sum(row.length for _, row in rows), desc="extract", unit="token", unit_scale=True) as progress,
    ):
        one_row = _Request(server, client, scratch, serve.request_timeout_s, convert)
        try:
            answers = in_order(rows, lambda row: pool.submit(one_row, row.id, tokens_of[row.id]), 2 * budget_tokens)
            for shard, row, answer in answers:
                head_check(row.id, answer)
                writer.put(Captured(shard, [row], *answer.states))
                progress.update(row.length)
        finally:
            pool.shutdown(cancel_futures=True)
    return writer.done


def check_settings(serve: Serve, facts: TargetFacts, longest: int) -> Serve:
    """`serve` as a capture needs it: the target's dtype, a context for `longest` tokens and the token asked for.

    Raises UserError for a foreign server, for flags that would corrupt or fight the capture, and for a row that leaves
    no room for one token.
    """
    if serve.url is not None:
        raise UserError(
            f"serve.url is {serve.url}, but hidden states come from a server that specflow starts: set extract.engine "
            "to transformers, or take url out"
        )
    flags = [word.split("=")[0] for word in serve.extra_args if word.startswith("-")]
    if found := [flag for flag in flags if flag.lstrip("-").replace("_", "-") in _FORBIDDEN]:
        raise UserError(
            f"serve.extra_args has {found[0]}, which would corrupt a capture: take it out, or set extract.engine to "
            "transformers"
        )
    if longest >= facts.max_position_embeddings:
        raise UserError(
            f"the longest row has {longest} tokens and vLLM needs one more, but the target's context is "
            f"{facts.max_position_embeddings}: set extract.max_length_tokens to {facts.max_position_embeddings - 1}"
        )
    context = min(max(longest + 1, 16), facts.max_position_embeddings)  # 16: the first request is a text of one letter
    if serve.dtype not in (None, facts.dtype):
        logger.warning(
            "extract: serve.dtype %s is not used, states are those of target.dtype %s", serve.dtype, facts.dtype
        )
    return serve.model_copy(update={"dtype": None, "max_model_len": context})


def with_capture(command: Launch, install: Install, layers: Layers, scratch: Path, budget_tokens: int) -> Launch:
    """The server's command with the capture's flags, last, so that they hold whatever else was said."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers.asked}},
    }
    connector: dict[str, Any] = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(scratch), "use_synchronization_lock": True},
    }
    environment = dict(command.environment)
    if install.on_cpu:
        connector |= {"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "specflow_connector"}
        inherited = environment.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGIN), inherited]))
    words = [
        "--no-enable-prefix-caching",
        "--no-enable-chunked-prefill",
        *("--max-num-batched-tokens", str(budget_tokens)),
        *("--max-num-seqs", str(MAX_REQUESTS)),
        # The model's own sampling defaults (a repetition penalty, say) would bend the token that is checked.
        *("--generation-config", "vllm"),
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
    return replace(command, argv=[*command.argv, *words], environment=environment)


def scratch_prefix(store: Path) -> str:
    """How the scratch folders of a store's captures begin."""
    return f"specflow-{hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:12]}-"


@contextlib.contextmanager
def scratch_folder(store: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder of our own for the engine's files, empty when it begins and gone when it ends.

    In shared memory where that has room for twice `needed_bytes`, else beside the store. What a killed capture of the
    same store left is removed, which another share's live folder must not be: it is locked.
    """
    shared = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * needed_bytes
    base = SHARED_MEMORY if shared else store.parent
    prefix = scratch_prefix(store)
    for left in base.glob(f"{prefix}*"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    with _locked(folder) as ours:
        assert ours, "a fresh folder is nobody else's"
        try:
            yield folder.resolve()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False where it is somebody else's folder or lock, or gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(handle).st_uid == os.getuid()
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


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
        path = self._file(content)
        return self.convert(row_id, tokens, self._take(row_id, path), content["choices"][0]["token_ids"][0])

    def _file(self, content: dict[str, Any]) -> Path:
        path = (content.get("kv_transfer_params") or {}).get("hidden_states_path")
        if path is None or Path(path).parent != self.scratch:
            raise UserError(
                f"vLLM names no file of hidden states in {self.scratch} (got {path}): use vLLM 0.32 or later"
            )
        return Path(path)

    def _take(self, row_id: str, path: Path) -> dict[str, Tensor]:
        """Read and delete a file once its writer has let go of the lock."""
        lock = path.with_name(f"{path.name}.lock")
        try:
            with lock.open("rb") as held:
                self._wait(row_id, held.fileno())
                found = load_file(path)
        except (OSError, SafetensorError) as error:
            self.server.check()
            raise RetryableError(f"extract: vLLM wrote no states of row {row_id} ({error})") from None
        path.unlink()
        lock.unlink()
        return found

    def _wait(self, row_id: str, handle: int) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RetryableError(f"extract: vLLM did not finish writing row {row_id}") from None
            time.sleep(WAIT_S)
