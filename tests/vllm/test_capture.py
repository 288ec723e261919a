"""Capture through a real vLLM: the transformers engine's states, row by row, and what a kill leaves.

The tolerance is relative to the largest state of the layer. Both engines compute in fp32 and differ in the order of
sums; a neighbouring layer differs by more than a tenth.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specflow.extract import stage as extract
from specflow.extract.engine_files import SHARED_MEMORY, scratch_prefix
from specflow.hidden_states import HiddenStateStore
from tests.captures import TinyProject, tiny_project, write_split
from tests.vllm.conftest import CACHE

TOLERANCE = 1e-4
SMOLLM2 = ("LlamaForCausalLM", 576, 30)
"""Architecture, width and layers of the demo's target."""


def make_rows(prefix: str, count: int, *, vocab_size: int, longest: int) -> list[dict[str, Any]]:
    rng = random.Random(prefix)
    rows = []
    for number in range(count):
        length = rng.randint(6, longest)
        token_ids = [rng.randrange(3, vocab_size) for _ in range(length)]
        rows.append({"id": f"{prefix}{number}", "category": "x", "token_ids": token_ids, "spans": [[2, length]]})
    return rows


def make_project(folder: Path, target: Path, venv: str, engine: str, **settings: Any) -> TinyProject:
    made = tiny_project(folder, target, extract={"engine": engine, **settings})
    made.settings["families"]["tiny"]["serve"] = {"venv": venv, "start_timeout_s": 300}
    made.params = type(made.params).model_validate(made.settings)
    return made


def open_store(project: TinyProject) -> HiddenStateStore:
    store = HiddenStateStore.open(project.paths.manifest)
    store.verify()
    return store


def assert_same_states(store: HiddenStateStore, reference: HiddenStateStore, tolerance: float) -> None:
    """Every row: the same tokens, and each layer's states within `tolerance` of the layer's largest one."""
    layers = [*reference.manifest.aux_layer_ids, "final"]
    for row, wanted in zip(store.rows(), reference.rows(), strict=True):
        tokens, *states = store.read(row)
        wanted_tokens, *wanted_states = reference.read(wanted)
        assert row == wanted and tokens.tolist() == wanted_tokens.tolist()
        width = reference.manifest.hidden_size
        got, expected = (torch.cat(both, -1).float().split(width, -1) for both in (states, wanted_states))
        for layer, one, other in zip(layers, got, expected, strict=True):
            difference = float((one - other).abs().max() / other.abs().max())
            assert difference < tolerance, f"row {row.id}, layer {layer}: {difference:.2g} of the largest state"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, vllm_venv: str) -> dict[str, TinyProject]:
    """The same rows to capture by both engines, several shards each; ids with the stream before the final norm."""
    folder = tmp_path_factory.mktemp("capture")
    made = {}
    for engine in ("transformers", "vllm"):
        project = make_project(
            folder / engine, tiny_target, vllm_venv, engine, aux_layer_ids=[0, 3, 6], shard_bytes=90_000
        )
        rows = [make_rows(prefix, count, vocab_size=300, longest=90) for prefix, count in (("t", 24), ("e", 6))]
        write_split(project.paths.samples, *rows)
        made[engine] = project
    made["transformers"].run(extract)
    return made


@pytest.fixture(scope="module")
def resumed(projects: dict[str, TinyProject]) -> dict[str, float]:
    """Metrics of a vLLM capture that was killed with SIGKILL at its third shard and run again."""
    projects["vllm"].run_killed(
        "specflow.extract.stage",
        "import specflow.hidden_states as store\n"
        "save, count = store.save_file, [0]\n"
        "def killing(tensors, path):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: path.write_bytes(b'half a shard'); kill()\n"
        "    save(tensors, path)\n"
        "store.save_file = killing",
        timeout_s=400,
    )
    assert not projects["vllm"].paths.manifest.exists()
    deadline = time.monotonic() + 30
    while servers_of(projects["vllm"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers_of(projects["vllm"]) == [], "the killed stage left its server"
    metrics = projects["vllm"].run(extract)
    assert servers_of(projects["vllm"]) == []
    return metrics


def servers_of(project: TinyProject) -> list[str]:
    """Command lines of processes that write to this project's scratch folder."""
    prefix = scratch_prefix(next((project.paths.state / "hidden_states").iterdir()))
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if prefix in line:
            found.append(line)
    return found


def test_every_state_is_that_of_transformers_after_a_kill(
    projects: dict[str, TinyProject], resumed: dict[str, float], vllm_install: Any
) -> None:
    stores = {engine: open_store(project) for engine, project in projects.items()}
    assert resumed["resumed_shards"] == 2 and resumed["shards"] > 3 and resumed["tok_s"] > 0
    assert stores["vllm"].manifest.engine == f"vllm {vllm_install.version}"
    assert stores["transformers"].manifest.engine.startswith("transformers ")
    assert_same_states(stores["vllm"], stores["transformers"], TOLERANCE)
    norms = {name: store.read(store.rows()[0])[1][:, 128:].norm() for name, store in stores.items()}
    assert norms["vllm"] > 1.5 * stores["vllm"].read(stores["vllm"].rows()[0])[2].norm(), "id n is before the norm"


def test_nothing_is_left_in_the_scratch_folder(projects: dict[str, TinyProject], resumed: dict[str, float]) -> None:
    store = open_store(projects["vllm"]).folder
    prefix = scratch_prefix(store)
    assert [path for base in (SHARED_MEMORY, store.parent) for path in base.glob(f"{prefix}*")] == []


@pytest.mark.parametrize("layers", [[1, 3, 6], [0, 4, 6], [0, 2, 6], [0, 3, 5]])
def test_a_shifted_layer_is_caught(
    projects: dict[str, TinyProject], resumed: dict[str, float], tmp_path: Path, tiny_target: Path, layers: list[int]
) -> None:
    shifted = make_project(tmp_path, tiny_target, "none", "transformers", aux_layer_ids=layers, shard_bytes=90_000)
    for split in ("train", "eval"):
        target = shifted.paths.samples / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((projects["vllm"].paths.samples / f"{split}.jsonl").read_bytes())
    shifted.run(extract)
    with pytest.raises(AssertionError, match="of the largest state"):
        assert_same_states(open_store(projects["vllm"]), open_store(shifted), 0.1)


def test_smollm2_through_vllm_equals_transformers(tmp_path: Path, vllm_venv: str) -> None:
    target = smollm2()
    if target is None:
        pytest.skip("SmolLM2 is not in the cache: `specflow fetch smollm2` puts it there")
    rows = [make_rows("t", 6, vocab_size=49152, longest=160), make_rows("e", 2, vocab_size=49152, longest=60)]
    stores = {}
    for engine in ("transformers", "vllm"):
        project = make_project(tmp_path / engine, target, vllm_venv, engine)
        write_split(project.paths.samples, *rows)
        project.run(extract)
        stores[engine] = open_store(project)
    assert stores["vllm"].manifest.aux_layer_ids == [2, 15, 27]
    assert_same_states(stores["vllm"], stores["transformers"], TOLERANCE)


def smollm2() -> Path | None:
    for file in CACHE.glob("targets/*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if (config["architectures"][0], config["hidden_size"], config["num_hidden_layers"]) == SMOLLM2:
            return file.parent
    return None
