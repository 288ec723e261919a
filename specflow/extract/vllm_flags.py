"""How vLLM is started so that it hands out hidden states, and how it numbers and names them.

Sources: vllm/v1/spec_decode/extract_hidden_states.py, .../v1/example_hidden_states_connector.py (0.32).
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specflow.errors import UserError
from specflow.serving.engines import Install, Launch

if TYPE_CHECKING:
    from specflow.config import Serve
    from specflow.targets.model import TargetFacts

PLUGIN = Path(__file__).parents[1] / "serving" / "vllm_plugin"
"""Folder put on the engine's PYTHONPATH; all it holds is the connector."""
MAX_REQUESTS = 64
"""In flight at once; by tokens, rows wait sooner."""
_FORBIDDEN = {"enable-prefix-caching", "enable-chunked-prefill", "speculative-config", "kv-transfer-config", "sc"}

logger = logging.getLogger("specflow")


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


def with_capture(
    command: Launch,
    install: Install,
    layers: Layers,
    scratch: Path,
    budget_tokens: int,
    *,
    max_requests: int = MAX_REQUESTS,
    answers: bool = False,
) -> Launch:
    """The server's command with the capture's flags, last, so that they hold whatever else was said.

    `answers`: it samples too, and finds the states of what it has answered in its prefix cache.
    """
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
    caching = ["--no-enable-prefix-caching"]
    if answers:
        caching = ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
        caching += ["--block-size", "32"] if install.on_cpu else []  # of 128, its default, a short row has no whole one
    words = [
        *caching,
        "--no-enable-chunked-prefill",
        *("--max-num-batched-tokens", str(budget_tokens)),
        *("--max-num-seqs", str(max_requests)),
        # The model's own sampling defaults (a repetition penalty, say) would bend the token that is checked.
        *("--generation-config", "vllm"),
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
    return replace(command, argv=[*command.argv, *words], environment=environment)


def file_of(path: str | None, scratch: Path) -> Path:
    """Where the engine says that the states are. Raises UserError where that is not in its folder."""
    if path is None or Path(path).parent != scratch:
        raise UserError(f"vLLM names no file of hidden states in {scratch} (got {path}): use vLLM 0.32 or later")
    return Path(path)
