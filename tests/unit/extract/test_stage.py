"""Capture: equal to transformers' output_hidden_states, planned, resumable, and honest about the disk."""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from specflow.config import parse_params
from specflow.errors import UserError
from specflow.extract import stage as extract
from specflow.hidden_states import Expected, HiddenStateStore
from specflow.sharding.shares import MERGE, Share
from specflow.targets.model import load_model
from tests.captures import tiny_project, write_split
from tests.toys import make_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


def make_samples(count, *, prefix="r", longest=70):
    rng = random.Random(prefix)
    rows = []
    for number in range(count):
        length = rng.randint(6, longest)
        start = rng.randint(1, length - 2)
        token_ids = [rng.randrange(3, 300) for _ in range(length)]
        rows.append({"id": f"{prefix}{number}", "category": "x", "token_ids": token_ids, "spans": [[start, length]]})
    return rows


def make_project(root, target, samples=None, evaluation=None, **settings):
    project = tiny_project(root, target, extract=settings)
    samples = make_samples(20) if samples is None else samples
    write_split(project.paths.samples, samples, make_samples(5, prefix="e") if evaluation is None else evaluation)
    return project


def open_store(project):
    store = HiddenStateStore.open(project.paths.manifest)
    store.verify()
    return store


def reference_states(project, row, layers):
    """Residual streams by transformers, one row at a time: hidden_states[k] is the stream after k layers, k < n."""
    model = load_model(project.facts, project.paths.cache)
    output = model.model(input_ids=torch.tensor([row["token_ids"]]), output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[k][0] for k in layers], -1), output.last_hidden_state[0]


@pytest.mark.parametrize("layers", [[0, 3, 5], [1], [5, 2, 4, 1]])
def test_states_equal_those_of_transformers(tmp_path, target, layers):
    samples = make_samples(20)
    project = make_project(tmp_path, target, samples, aux_layer_ids=layers)
    metrics = project.run(extract)
    store = open_store(project)
    assert store.manifest.aux_layer_ids == sorted(layers)
    infos = {row.id: row for row in store.rows("train")}
    assert len(infos) == len(samples) == metrics["captured_rows"] - 5
    for row in samples:
        token_ids, aux, final = store.read(infos[row["id"]])
        expected_aux, expected_final = reference_states(project, row, sorted(layers))
        assert token_ids.tolist() == row["token_ids"] and infos[row["id"]].spans == [tuple(s) for s in row["spans"]]
        torch.testing.assert_close(aux, expected_aux, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-4)
    shifted, _ = reference_states(project, row, [k + 1 if k < 5 else k - 1 for k in sorted(layers)])
    assert (aux - shifted).abs().max() > 0.1  # the ids next to ours are other tensors


def test_stream_after_the_last_layer_is_captured_before_the_norm(tmp_path, target):
    project = make_project(tmp_path, target, aux_layer_ids=[6])
    project.run(extract)
    store = open_store(project)
    _, aux, final = store.read(store.rows("train")[0])
    norm = load_model(project.facts, project.paths.cache).model.norm
    torch.testing.assert_close(norm(aux), final, rtol=1e-4, atol=1e-4)


def test_store_is_packed_into_bounded_shards_in_the_wanted_dtype(tmp_path, target):
    project = make_project(tmp_path, target, dtype="bfloat16", shard_bytes=60_000)
    metrics = project.run(extract)
    facts, store = project.facts, open_store(project)
    ids = facts.default_aux_layer_ids()
    HiddenStateStore.open(project.paths.manifest, Expected(facts.digest, facts.template_digest, "bfloat16", ids))
    assert metrics["shards"] == len(store.manifest.shards) > 2
    assert all(shard.bytes < 60_500 for shard in store.manifest.shards)
    assert sum(shard.tokens for shard in store.manifest.shards) == sum(row.length for row in store.rows())
    assert store.read(store.rows()[0])[1].dtype == torch.bfloat16
    assert not store.manifest.folder.startswith("/")


@pytest.mark.parametrize("policy, kept, spans", [("cut", ["long", "short"], [(5, 30)]), ("drop", ["short"], None)])
def test_long_and_unsupervised_rows_are_counted(tmp_path, target, policy, kept, spans):
    tokens = list(range(3, 63))
    samples = [
        {"id": "long", "category": "x", "token_ids": tokens, "spans": [[5, 40], [50, 60]]},
        {"id": "short", "category": "x", "token_ids": tokens[:20], "spans": [[5, 20]]},
        {"id": "beyond", "category": "x", "token_ids": tokens, "spans": [[40, 60]]},
        {"id": "none", "category": "x", "token_ids": tokens[:9], "spans": []},
    ]
    project = make_project(tmp_path, target, samples, [], max_length_tokens=30, on_too_long=policy)
    metrics = project.run(extract)
    rows = {row.id: row for row in open_store(project).rows()}
    assert sorted(rows) == kept
    assert metrics["cut_rows"] == (2 if policy == "cut" else 0) and metrics["dropped_rows"] == (
        0 if policy == "cut" else 2
    )
    assert metrics["unsupervised_rows"] == (2 if policy == "cut" else 1)
    if spans:
        assert rows["long"].length == 30 and rows["long"].spans == spans


def test_killed_and_resumed_is_byte_identical(tmp_path, target):
    whole, killed = (make_project(tmp_path / name, target, shard_bytes=60_000) for name in ("whole", "killed"))
    whole.run(extract)
    killed.run_killed(
        "specflow.extract.stage",
        "import specflow.hidden_states as store\n"
        "save, count = store.save_file, [0]\n"
        "def killing(tensors, path):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: path.write_bytes(b'half a shard'); kill()\n"
        "    save(tensors, path)\n"
        "store.save_file = killing",
    )
    assert not killed.paths.manifest.exists()
    metrics = killed.run(extract)
    assert metrics["resumed_shards"] == 2
    assert killed.paths.manifest.read_bytes() == whole.paths.manifest.read_bytes()
    for shard in open_store(whole).manifest.shards:
        one, other = (open_store(project).folder / shard.file for project in (whole, killed))
        assert one.read_bytes() == other.read_bytes()


def test_an_experiment_takes_over_the_store_of_the_same_inputs(tmp_path, target):
    """From its copy below .dvc/tmp/exps; with other settings it makes a store of its own and leaves the first one."""
    project = make_project(tmp_path / "home", target)
    project.run(extract)
    copy = tmp_path / "home" / ".dvc" / "tmp" / "exps" / "one"
    shutil.copytree(project.paths.base, copy / "artifacts" / "tiny")
    experiment = replace(project, paths=replace(project.paths, root=copy))
    metrics = experiment.run(extract)
    assert metrics["resumed_shards"] == metrics["shards"] > 0
    assert open_store(experiment).folder.resolve() == open_store(project).folder.resolve()
    experiment.settings["families"]["tiny"]["extract"]["dtype"] = "bfloat16"
    experiment.params = parse_params(experiment.settings)
    assert experiment.run(extract)["resumed_shards"] == 0
    assert open_store(project).manifest.dtype == "float32" and open_store(experiment).manifest.dtype == "bfloat16"


def test_a_damaged_shard_is_made_again_and_whole_ones_are_kept(tmp_path, target):
    project = make_project(tmp_path, target, shard_bytes=60_000)
    first = project.run(extract)
    manifest = project.paths.manifest.read_bytes()
    shard = open_store(project).folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[::-1])
    assert project.run(extract)["resumed_shards"] == first["shards"] - 1
    assert project.paths.manifest.read_bytes() == manifest
    open_store(project)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, target, monkeypatch):
    project = make_project(tmp_path, target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
    with pytest.raises(UserError, match=r"GB to write, but the disk of .* GB free"):
        project.run(extract)
    assert not list(project.paths.state.rglob("*.safetensors"))


@pytest.mark.parametrize("layers", [[1, 1], [2, 7]])
def test_layer_ids_that_cannot_be(tmp_path, target, layers):
    with pytest.raises(UserError, match=r"aux_layer_ids is .*: give distinct ids within 0..6"):
        make_project(tmp_path, target, aux_layer_ids=layers).run(extract)


def test_states_that_overflow_name_the_row(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_target(tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[299] *= 1e6
    model.save_pretrained(folder)
    samples = make_samples(6)
    for row in samples:
        row["token_ids"] = [min(token, 298) for token in row["token_ids"]]
    samples[4]["token_ids"][-1] = 299
    project = make_project(tmp_path, folder, samples, [], dtype="float16")
    with pytest.raises(UserError, match="states of row r4 are NaN or infinite in float16"):
        project.run(extract)
    assert not project.paths.manifest.exists()


def test_nothing_to_capture(tmp_path, target):
    row = {"id": "a", "category": "x", "token_ids": [3, 4, 5], "spans": []}
    with pytest.raises(UserError, match="none of 1 sample rows has a supervised token"):
        make_project(tmp_path, target, [row], []).run(extract)


def test_shares_put_together_are_byte_identical(tmp_path, target):
    """Batches that cross no shard file make the layout, and so every rounding, the same in however many processes."""
    settings = {"shard_bytes": 60_000, "dtype": "bfloat16"}
    whole, split = (make_project(tmp_path / name, target, **settings) for name in ("whole", "split"))
    expected = whole.run(extract)
    args = ("tiny", split.family, split.params, split.paths)
    extract.run_share(*args, Share(1, 2))
    log = lambda values, step: None  # noqa: E731
    with pytest.raises(UserError, match="rows are missing although every share is done"):
        extract.run(*args, log, MERGE)
    assert not split.paths.manifest.exists()
    extract.run_share(*args, Share(0, 2))
    merged = extract.run(*args, log, MERGE)
    assert merged["resumed_shards"] == merged["shards"] == expected["shards"] > 2
    assert split.paths.manifest.read_bytes() == whole.paths.manifest.read_bytes()
    for shard in open_store(split).manifest.shards:
        one, other = (open_store(project).folder / shard.file for project in (whole, split))
        assert one.read_bytes() == other.read_bytes()
