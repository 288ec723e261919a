"""The hidden-state store: round trip, and every way in which it may not be what the reader needs."""

import dataclasses

import pytest
import torch

from specflow.errors import UserError
from specflow.files import write_json
from specflow.hidden_states import (
    Captured,
    Expected,
    HiddenStateStore,
    Manifest,
    PlannedShard,
    RowInfo,
    ShardWriter,
    bytes_per_token,
)

EXPECTED = Expected(target_digest="t" * 64, template_digest="m" * 64, dtype="bfloat16", aux_layer_ids=[2, 3])
WIDTH = 8


def make_store(root, *, spoil=None):
    """Two shards, rows of 3, 2 and 4 tokens; returns the manifest's path and the tensors written by row id."""
    rows = [
        RowInfo(id="a", split="train", category="x", shard=0, offset=0, length=3, spans=[(1, 3)]),
        RowInfo(id="b", split="eval", category="x", shard=0, offset=3, length=2, spans=[(0, 1)]),
        RowInfo(id="c", split="train", category="y", shard=1, offset=0, length=4, spans=[(2, 4)]),
    ]
    shards = [PlannedShard(0, tuple(rows[:2]), "key"), PlannedShard(1, tuple(rows[2:]), "key")]
    torch.manual_seed(0)
    written = {}
    folder = root / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "bfloat16") as writer:
        for shard in shards:
            for row in shard.rows:
                token_ids = torch.randint(0, 99, (row.length,), dtype=torch.int32)
                aux, final = torch.randn(row.length, 2 * WIDTH).bfloat16(), torch.randn(row.length, WIDTH).bfloat16()
                if row.id == spoil:
                    aux[1, 3] = torch.nan
                written[row.id] = (token_ids.long(), aux, final)
                finite = (
                    torch.isfinite(aux).all(-1) if spoil != "unchecked" else torch.ones(row.length, dtype=torch.bool)
                )
                writer.put(Captured(shard, [row], token_ids, aux, final, finite))
    manifest = Manifest(
        family="tiny",
        **vars(EXPECTED),
        tokenizer_digest="k",
        samples_digest="s",
        hidden_size=WIDTH,
        folder="shards",
        shards=[writer.done[0], writer.done[1]],
        rows=rows,
    )
    write_json(root / "hidden_states.json", manifest.model_dump(mode="json"))
    return root / "hidden_states.json", written


def test_round_trip(tmp_path):
    path, written = make_store(tmp_path)
    store = HiddenStateStore.open(path, EXPECTED)
    store.verify()
    assert [row.id for row in store.rows("train")] == ["a", "c"] and [row.id for row in store.rows("eval")] == ["b"]
    for row in store.rows():
        for got, wanted in zip(store.read(row), written[row.id], strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_estimate_is_the_size_on_disk_but_for_the_header(tmp_path):
    path, _ = make_store(tmp_path)
    for shard in HiddenStateStore.open(path).manifest.shards:
        assert 0 < shard.bytes - shard.tokens * bytes_per_token(WIDTH, 2, "bfloat16") < 400


@pytest.mark.parametrize(
    "field, value",
    [("target_digest", "u" * 64), ("template_digest", "n" * 64), ("dtype", "float32"), ("aux_layer_ids", [1, 3])],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, field, value):
    path, _ = make_store(tmp_path)
    with pytest.raises(UserError, match=rf"have {field} .* expected .*run `dvc repro -f extract@tiny`"):
        HiddenStateStore.open(path, dataclasses.replace(EXPECTED, **{field: value}))


def test_missing_short_and_corrupted_shards(tmp_path):
    path, _ = make_store(tmp_path)
    shard = tmp_path / "shards" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    HiddenStateStore.open(path)  # of the right size: only the digest tells
    with pytest.raises(UserError, match=r"shard-00001.safetensors is corrupted.*extract@tiny"):
        HiddenStateStore.open(path).verify()
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=f"has {len(whole) - 3} bytes, the manifest says {len(whole)}"):
        HiddenStateStore.open(path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing: run `dvc repro -f extract@tiny`"):
        HiddenStateStore.open(path)
    with pytest.raises(UserError, match=r"manifest .* is missing"):
        HiddenStateStore.open(tmp_path / "none.json")


def test_a_shard_with_a_damaged_header_names_the_row(tmp_path):
    path, _ = make_store(tmp_path)
    shard = tmp_path / "shards" / "shard-00000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    store = HiddenStateStore.open(path)
    with pytest.raises(UserError, match="row a cannot be read"):
        store.read(store.rows()[0])


def test_states_that_are_not_finite_name_the_row_when_written(tmp_path):
    with pytest.raises(UserError, match="extract: states of row c are NaN or infinite in bfloat16"):
        make_store(tmp_path, spoil="c")
    assert not (tmp_path / "hidden_states.json").exists()


def test_states_that_are_not_finite_name_the_row_when_read(tmp_path):
    from safetensors.torch import load_file, save_file

    path, _ = make_store(tmp_path)
    shard = tmp_path / "shards" / "shard-00000.safetensors"
    tensors = load_file(shard)
    tensors["final"][4, 0] = torch.inf
    save_file(tensors, shard)
    store = HiddenStateStore.open(path)
    store.read(store.rows("train")[0])
    with pytest.raises(UserError, match="row b"):
        store.read(store.rows("eval")[0])
