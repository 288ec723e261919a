"""A real vLLM in an environment of its own, and a tiny target that its CPU attention takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specflow.config import Serve
from specflow.errors import UserError
from specflow.serving.engines import Install, find_install
from tests.toys import make_tiny_target

CACHE = Path("~/.cache/specflow").expanduser()
"""Where `make vllm-cpu` builds."""


@pytest.fixture(scope="session")
def vllm_install() -> Install:
    """vLLM for CPU; a user without it sees these tests skipped, CI sets SPECFLOW_REQUIRE_VLLM and does not."""
    try:
        return find_install("vllm", Serve(), CACHE)
    except UserError as error:
        if os.environ.get("SPECFLOW_REQUIRE_VLLM"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vllm_venv(vllm_install: Install) -> str:
    """What `serve.venv` names: tests have caches of their own, in which nothing is built."""
    return str(vllm_install.python.parent.parent)


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's CPU attention takes head dimensions 32, 64, 80, 96, ...; six layers give three distinct aux layers."""
    folder = tmp_path_factory.mktemp("vllm") / "target"
    return make_tiny_target(folder, hidden_size=64, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
