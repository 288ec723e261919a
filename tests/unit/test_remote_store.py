"""A store that machines share: shards go there whole, come back verified, and equal those of a local store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from specflow import remote_store
from specflow.config import parse_params
from specflow.errors import RetryableError, UserError
from specflow.extract import stage as extract
from specflow.hidden_states import HiddenStateStore
from specflow.sharding.shares import MERGE, Share
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import make_tiny_target

SETTINGS = {"shard_bytes": 40_000}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(params=["memory://bucket/states", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    url = request.param if request.param != "file" else f"file://{tmp_path / 'shared'}"
    yield url
    fsspec.filesystem("memory").store.clear()


def make_project(root: Path, target: Path, store: str | None = None) -> TinyProject:
    project = tiny_project(root, target, extract=SETTINGS)
    project.params = parse_params({**project.settings, "store": store})
    rows = [
        {"id": f"r{n}", "category": "x", "token_ids": list(range(3, 20 + 2 * n)), "spans": [[4, 15]]} for n in range(16)
    ]
    write_split(project.paths.samples, rows, [])
    return project


def files_of(store: str) -> dict[str, bytes]:
    files, folder = fsspec.core.url_to_fs(store)
    return {Path(path).name: files.cat_file(path) for path in files.find(folder)}


def test_shards_are_those_of_a_local_store_and_come_back(tmp_path: Path, target: Path, store: str) -> None:
    local, shared = make_project(tmp_path / "local", target), make_project(tmp_path / "there", target, store)
    local.run(extract)
    metrics = shared.run(extract)
    folder = next((local.paths.state / "hidden_states").glob("*/"))
    assert files_of(store) == {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert not list(shared.paths.state.rglob("*.safetensors")) and metrics["shards"] > 2  # moved, not copied
    here, there = (HiddenStateStore.open(project.paths.manifest) for project in (local, shared))
    assert [shard.sha256 for shard in here.manifest.shards] == [shard.sha256 for shard in there.manifest.shards]
    first = there.rows()[0]
    for one, other in zip(here.read(here.rows()[0]), there.read(first), strict=True):
        assert torch.equal(one, other)
    cached = list(shared.paths.state.rglob("*.safetensors"))
    assert [file.name for file in cached] == [there.manifest.shards[first.shard].file]  # what was read, no more
    HiddenStateStore.open(shared.paths.manifest).verify()  # brings and checks the rest
    assert len(list(shared.paths.state.rglob("*.safetensors"))) == metrics["shards"]


def test_a_second_run_and_shares_find_what_is_in_the_store(tmp_path: Path, target: Path, store: str) -> None:
    project = make_project(tmp_path / "a", target, store)
    args: tuple[Any, ...] = ("tiny", project.family, project.params, project.paths)
    for index in range(2):
        extract.run_share(*args, Share(index, 2))
    merged = extract.run(*args, lambda values, step: None, MERGE)
    assert merged["resumed_shards"] == merged["shards"] > 2
    manifest = project.paths.manifest.read_bytes()
    again = project.run(extract)
    assert again["resumed_shards"] == again["shards"] and project.paths.manifest.read_bytes() == manifest


def test_what_is_damaged_or_gone_is_said(tmp_path: Path, target: Path, store: str) -> None:
    project = make_project(tmp_path / "a", target, store)
    project.run(extract)
    manifest = HiddenStateStore.open(project.paths.manifest).manifest
    files, folder = fsspec.core.url_to_fs(str(manifest.store))
    file, whole = f"{folder}/{manifest.shards[1].file}", manifest.shards[1].bytes
    files.pipe_file(file, b"x" * whole)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors has sha256 .*, the manifest says"):
        HiddenStateStore.open(project.paths.manifest).verify()
    assert not list(project.paths.state.rglob("*00001.safetensors"))
    files.rm(file)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing or cut off"):
        HiddenStateStore.open(project.paths.manifest)
    assert project.run(extract)["resumed_shards"] == len(manifest.shards) - 1
    HiddenStateStore.open(project.paths.manifest).verify()


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="store nothing://x: Protocol not known: nothing"):
        remote_store.upload(file, "nothing://x")
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(RetryableError, match="cannot be reached or written"):
        remote_store.upload(file, f"file://{tmp_path / 'taken'}/below")
    shutil.rmtree(tmp_path / "shared", ignore_errors=True)
    assert remote_store.size(f"file://{tmp_path / 'shared'}", "a") is None
