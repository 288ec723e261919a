"""The whole check passes every supported architecture as transformers saves it, and sees each tensor that is gone.

Head and embedding are found by what the loaded model holds: compared with a model that was really loaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from specflow.errors import UserError
from specflow.targets.checkpoint import LoadedModel, check_whole
from specflow.targets.weights import INDEX, SINGLE, read_tensor, stored_tensors, weight_files
from tests.toys import make_tiny_target
from tests.unit.targets.test_architectures import ARCHITECTURES, make_model


def checked(folder: Path) -> LoadedModel:
    return check_whole(folder, AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_and_its_tables_are_the_loaded_ones(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    found = checked(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(read_tensor(tmp_path, found.lm_head_key), head)
    assert torch.equal(read_tensor(tmp_path, found.embedding_key), embedding)
    assert found.tie_word_embeddings == (head is embedding)
    assert found.num_parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "mixtral", "gemma3"])
def test_no_tensor_can_be_missing(name: str, tmp_path: Path) -> None:
    """Each kind of tensor of one layer, and all outside the layers, taken out in turn; experts one projection at a
    time, and one whole expert.
    """
    make_model(name).save_pretrained(tmp_path)
    whole = load_file(tmp_path / SINGLE)
    text = [key for key in whole if "vision" not in key]
    gone = [[key] for key in text if ".layers." not in key or ".layers.1." in key]
    experts = sorted(key for key in whole if "layers.1." in key and ".experts.3." in key)
    if experts:  # of these models only what differs from the others'
        gone = [[key] for key in whole if "layers.1." in key and "gate.weight" in key]
        gone += [experts[:1], experts[1:2], experts]
    assert len(gone) >= 4
    for keys in gone:
        save_file({key: value for key, value in whole.items() if key not in keys}, tmp_path / SINGLE)
        with pytest.raises(UserError, match=r"lacks [12] of|one is missing or of another shape|has shape"):
            checked(tmp_path)


def test_only_what_is_loaded_counts(tmp_path: Path) -> None:
    make_tiny_target(tmp_path, max_shard_size="60KB")
    shards = weight_files(tmp_path)
    assert len(shards) == 7
    save_file({"lm_head.weight": torch.zeros(9, 9)}, tmp_path / "consolidated.safetensors")
    save_file({"lm_head.weight": torch.zeros(9, 9)}, tmp_path / "adapter_model.safetensors")
    assert weight_files(tmp_path) == shards
    stored = stored_tensors(tmp_path)
    assert stored["lm_head.weight"].shape == (300, 32) and stored["lm_head.weight"].dtype == "F32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read_tensor(tmp_path, "lm_head.weight"), model.lm_head.weight)


def test_an_index_of_the_one_file_is_no_contradiction(tmp_path: Path) -> None:
    make_tiny_target(tmp_path)
    names = {name: SINGLE for name in stored_tensors(tmp_path)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    assert checked(tmp_path).lm_head_key == "lm_head.weight"


def test_the_check_reads_no_weights(tmp_path: Path) -> None:
    """A checkpoint of 8 B parameters, 16 GB of holes on disk, is checked in the memory of its headers."""
    config = AutoConfig.for_model("llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336)
    config.update({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8})
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with (tmp_path / SINGLE).open("wb") as stream:
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + end)
    before = _resident_bytes()
    found = check_whole(tmp_path, config)
    assert found.num_parameters * 2 == end > 16e9 and found.lm_head_key == "lm_head.weight"
    assert _resident_bytes() - before < 5e8


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
