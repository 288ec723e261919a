"""Target folders as downloads, edits and other people's tools leave them: `fetch` says what is wrong, or they run."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.attacks.bad_input import BadInput
from tests.toys import CHATML, make_tiny_target, make_tiny_tokenizer
from tests.unit.targets.test_fetch import write_gguf

Damage = Callable[[Path], None]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"
WEIGHTS = "model.safetensors"


def write(name: str, content: str | bytes) -> Damage:
    """A file of the target's folder with other content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: _write(folder / "target" / name, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cut(name: str, drop: int) -> Damage:
    """A file without its last bytes."""
    return lambda folder: _write(folder / "target" / name, (folder / "target" / name).read_bytes()[:-drop])


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / "target" / name).unlink(missing_ok=True)

    return damage


def config(name: str = "config.json", *, without: tuple[str, ...] = (), **changes: Any) -> Damage:
    """A JSON file of the target with other or fewer keys."""

    def damage(folder: Path) -> None:
        path = folder / "target" / name
        content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in without}))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], None], **settings: Any) -> Damage:
    """Other tensors in the one file, and perhaps other settings in config.json."""

    def damage(folder: Path) -> None:
        path = folder / "target" / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        config(**settings)(folder)

    return damage


def shards(change: Callable[[Path], None]) -> Damage:
    """The target in shards with an index, then `change` of its folder."""

    def damage(folder: Path) -> None:
        target = folder / "target"
        (target / WEIGHTS).unlink()
        make_tiny_target(target, max_shard_size="60KB")
        change(target)

    return damage


def shard_files(target: Path) -> list[Path]:
    return sorted(target.glob("model-*.safetensors"))


def index(change: Callable[[dict[str, str]], None]) -> Damage:
    """Another weight_map in the index of the target in shards."""

    def edit(target: Path) -> None:
        path = target / "model.safetensors.index.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return shards(edit)


def template(text: str | bytes) -> Damage:
    """The tokenizer's own template."""
    return write("chat_template.jinja", text)


def in_params(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Other parameters of the project."""

    def damage(folder: Path) -> None:
        path = folder / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(params)
        path.write_text(yaml.safe_dump(params), encoding="utf-8")

    return damage


def settings(section: str, **values: Any) -> Damage:
    """Other settings of the family."""
    return in_params(lambda params: params["families"]["tiny"].setdefault(section, {}).update(values))


def own_template(data: bytes) -> Damage:
    """A template file of the project."""

    def damage(folder: Path) -> None:
        (folder / "own.jinja").write_bytes(data)
        settings("target", chat_template=str(folder / "own.jinja"))(folder)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def pipe(name: str) -> Damage:
    """A named pipe in the place of a file: whoever opens it waits for ever."""

    def damage(folder: Path) -> None:
        (folder / "target" / name).unlink()
        os.mkfifo(folder / "target" / name)

    return damage


def one_file_and_an_index(folder: Path) -> None:
    target = folder / "target"
    make_tiny_target(target, seed=5, max_shard_size="60KB")


def consolidated(folder: Path) -> None:
    target = folder / "target"
    tensors = {f"layers.{name}": tensor.clone() for name, tensor in load_file(target / WEIGHTS).items()}
    save_file(tensors, target / "consolidated.safetensors")


def two_named_templates(folder: Path) -> None:
    target = folder / "target"
    (target / "chat_template.jinja").unlink()
    named = [{"name": name, "template": CHATML} for name in ("tool_use", "default")]
    config("tokenizer_config.json", chat_template=named)(folder)
    settings("target", template_options={"enable_thinking": False})(folder)


def named_without_default(folder: Path) -> None:
    (folder / "target" / "chat_template.jinja").unlink()
    named = [{"name": name, "template": CHATML} for name in ("tool_use", "rag")]
    config("tokenizer_config.json", chat_template=named)(folder)


def dangling(folder: Path) -> None:
    """A cache from which only the blobs were cleared."""
    (folder / "target" / WEIGHTS).unlink()
    (folder / "target" / WEIGHTS).symlink_to("../../blobs/4d7a2146")


def gguf(change: Callable[[bytes], bytes]) -> Damage:
    """A GGUF file as target, with other bytes."""

    def damage(folder: Path) -> None:
        path = folder / "tiny.gguf"
        model = AutoModelForCausalLM.from_pretrained(folder / "target")
        write_gguf(path, model, make_tiny_tokenizer())
        path.write_bytes(change(path.read_bytes()))
        settings("target", source=f"file:{path}")(folder)

    return damage


def larger_tokenizer(folder: Path) -> None:
    make_tiny_tokenizer(330).save_pretrained(folder / "target")


def to_int8(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = (tensor * 8).to(torch.int8) if tensor.ndim == 2 else tensor


def packed(tensors: dict[str, torch.Tensor]) -> None:
    """Linear layers as compressed-tensors packs them: eight weights in an int32, a scale beside."""
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors.pop(name).shape
        tensors[name.replace("weight", "weight_packed")] = torch.zeros(rows, columns // 8, dtype=torch.int32)
        tensors[name.replace("weight", "weight_scale")] = torch.ones(rows, 1)


def mtp_layer(tensors: dict[str, torch.Tensor]) -> None:
    """A layer for several tokens at once, with copies of embedding and head, as GLM-4.5 and DeepSeek-V3 have."""
    tensors["model.layers.6.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.6.shared_head.head.weight"] = tensors["lm_head.weight"]


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def _to_first(name: str) -> Damage:
    return index(lambda names: names.update({name: min(names.values())}))


def _outside(names: dict[str, str]) -> None:
    names["lm_head.weight"] = "../target/model-00001-of-00004.safetensors"


def _twice(target: Path) -> None:
    first, *_, last = shard_files(target)
    save_file({**load_file(first), **load_file(last)}, last, metadata={"format": "pt"})


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
HEAD = "lm_head.weight"

DAMAGES: list[tuple[str, Damage, tuple[str, ...]]] = [
    # weights
    ("weights are an LFS pointer", write(WEIGHTS, POINTER), ("Git LFS pointer", "git lfs pull")),
    ("weights cut off", cut(WEIGHTS, 1000), (WEIGHTS, "damaged or cut off", "fetch it again")),
    ("weights empty", write(WEIGHTS, b""), (WEIGHTS, "damaged or cut off")),
    ("weights of text", write(WEIGHTS, "<html>404</html>" * 9), (WEIGHTS, "damaged or cut off")),
    ("header longer than the file", write(WEIGHTS, struct.pack("<Q", 90_000_000) + b"{}"), ("damaged or cut off",)),
    ("header of 2**62 bytes", write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), ("damaged or cut off",)),
    ("weights missing", remove(WEIGHTS), ("no safetensors weights", "convert")),
    ("weights are a pipe", pipe(WEIGHTS), ("no safetensors weights",)),
    ("weights are a link to nothing", dangling, (WEIGHTS, "blobs/4d7a2146", "not there")),
    ("GGUF cut off", gguf(lambda data: data[:-1000]), ("cannot read tiny.gguf", "use a whole GGUF")),
    ("GGUF cut off in its header", gguf(lambda data: data[:3000]), ("cannot read tiny.gguf", "use a whole GGUF")),
    ("GGUF of 2**60 tensors", gguf(lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:]), ("tiny.gguf",)),
    ("GGUF unknown", gguf(lambda data: data.replace(b"llama", b"llamx")), ("tiny.gguf", "llamx", "supports")),
    (
        "a layer's tensor missing",
        weights(without("model.layers.3.mlp.up_proj.weight")),
        ("layers.3.mlp.up_proj", "lacks 1"),
    ),
    ("head missing", weights(without(HEAD)), ("lacks 1", HEAD)),
    ("embedding missing", weights(without("model.embed_tokens.weight")), ("lacks 1", "embed_tokens")),
    ("a tensor of another shape", weights(replaced("model.norm.weight", torch.ones(31))), ("norm", "[31]", "[32]")),
    ("weights in int8", weights(to_int8), ("I8", "expected a float dtype", "unquantised")),
    ("head in int8", weights(replaced(HEAD, torch.ones(300, 32, dtype=torch.int8))), (HEAD, "I8")),
    ("one file and an index", one_file_and_an_index, (WEIGHTS, "index", "transformers", "vLLM", "remove")),
    ("a shard missing", shards(lambda t: shard_files(t)[2].unlink()), ("1 of", "model-00003", "fetch the checkpoint")),
    (
        "a shard is an LFS pointer",
        shards(lambda t: _write(shard_files(t)[1], POINTER.encode())),
        ("model-00002", "LFS"),
    ),
    ("a shard cut off", shards(lambda t: _write(shard_files(t)[1], shard_files(t)[1].read_bytes()[:-9])), ("cut off",)),
    ("index names the wrong shard", _to_first("model.norm.weight"), ("model.norm.weight", "index", "model-00001")),
    ("index leaves a shard out", _to_first(HEAD), ("lacks 1", HEAD)),
    ("index names a path", index(_outside), ("index", "../target")),
    ("index without a map", shards(lambda t: _write(t / "model.safetensors.index.json", b'{"a": 1}')), ("weight_map",)),
    ("index cut off", shards(lambda t: _write(t / "model.safetensors.index.json", b'{"weight_')), ("not valid JSON",)),
    ("a tensor in two shards", shards(_twice), ("model-00001", "lies in", "remove")),
    ("tied, with a head of its own", config(tie_word_embeddings=True), ("tie_word_embeddings", HEAD, "differs")),
    ("adapter beside the weights", write("adapter_config.json", "{}"), ("adapter", "merged")),
    # config
    ("config cut off", cut("config.json", 20), ("config.json", "not valid JSON")),
    ("config is an LFS pointer", write("config.json", POINTER), ("config.json", "LFS pointer")),
    ("config in UTF-16", write("config.json", '{"model_type": "llama"}'.encode("utf-16")), ("config.json", "UTF-8")),
    ("config is a list", write("config.json", "[]"), ("config.json", "no JSON object", "list")),
    ("config nested deep", write("config.json", '{"a":' * 99_999), ("config.json", "not valid JSON")),
    ("config missing", remove("config.json"), ("no config.json",)),
    ("config is a pipe", pipe("config.json"), ("no config.json",)),
    ("model type unknown", config(model_type="llama_next_9"), ("llama_next_9", "does not know", "install")),
    ("model type missing", config(without=("model_type",)), ("model_type None",)),
    ("code of its own", config(model_type="x", auto_map={"AutoConfig": "c.C"}), ("trust_remote_code",)),
    ("no layer count", config(without=("num_hidden_layers",)), ("num_hidden_layers", "add the model's")),
    ("no head count", config(without=("num_attention_heads", "head_dim")), ("num_attention_heads", "add the model's")),
    ("a billion layers", config(num_hidden_layers=10**9), ("1000000000 layers", "57 tensors")),
    ("layers of text", config(num_hidden_layers="six"), ("config.json", "num_hidden_layers")),
    ("one layer more", config(num_hidden_layers=7), ("lacks 9", "layers.6")),
    ("another head count", config(num_attention_heads=8), ("layers.0.self_attn.o_proj", "[32, 64]", "[32, 128]")),
    ("another vocabulary", config(vocab_size=400), ("[300, 32]", "[400, 32]")),
    ("activation unknown", config(hidden_act="silux"), ("config.json", "silux", "correct it")),
    ("RoPE unknown", config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ("config.json", "spiral")),
    ("quantised by GPTQ", config(quantization_config=GPTQ), ("quantised (gptq)", "fp8", "compressed-tensors", "vLLM")),
    ("quantised by AWQ", config(quantization_config=AWQ), ("quantised (awq)", "compressed-tensors")),
    ("quantised by bitsandbytes", config(quantization_config={"quant_method": "bitsandbytes"}), ("bitsandbytes",)),
    (
        "FP8 in this process",
        config(quantization_config=FP8),
        ("quantised (fp8)", "sample.engine", "extract.engine", "vLLM"),
    ),
    ("compressed in this process", config(quantization_config=INT4), ("quantised (compressed-tensors)", "vLLM")),
    (
        "packed, but copied from",
        both(
            weights(packed, quantization_config=INT4),
            settings("sample", engine="vllm"),
            settings("extract", engine="vllm"),
        ),
        ("layers.5.mlp.gate_proj.weight", "take mlp out of train.init_from_target"),
    ),
    (
        "FP8 in online training",
        both(
            config(quantization_config=FP8),
            settings("sample", engine="vllm"),
            in_params(lambda params: params.update(online=["tiny"], offline=[])),
        ),
        ("quantised (fp8)", "train_online"),
    ),
    ("an encoder", config(model_type="bert"), ("bert",)),
    # tokenizer
    (
        "without tokenizer",
        remove("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        ("no tokenizer", "put the model's"),
    ),
    ("tokenizer cut off", cut("tokenizer.json", 200), ("tokenizer.json", "not valid JSON")),
    ("tokenizer is an LFS pointer", write("tokenizer.json", POINTER), ("tokenizer.json", "LFS pointer")),
    ("tokenizer of another model", larger_tokenizer, ("tokenizer", "329", "embedding 300 rows")),
    ("tokenizer config cut off", cut("tokenizer_config.json", 30), ("tokenizer_config.json", "not valid JSON")),
    ("tokenizer of no kind", write("tokenizer.json", '{"model": {"type": "X"}}'), ("tokenizer", "put the model's")),
    ("end token beyond the vocabulary", config("generation_config.json", eos_token_id=5000), ("5000", "eos_token_id")),
    ("generation config cut off", cut("generation_config.json", 5), ("generation_config.json", "not valid JSON")),
    # template
    ("named templates without default", named_without_default, ("['rag', 'tool_use']", "default", "chat_template")),
    ("template without end", template(LOOP), ("chat template", "is not done", "target.chat_template")),
    ("template that divides by zero", template("{{ 1 / 0 }}"), ("chat template", "ZeroDivisionError")),
    ("template that adds text to numbers", template("{{ 1 + messages[0]['content'] }}"), ("TypeError",)),
    ("template that calls itself", template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), ("RecursionError",)),
    ("template broken off", template(CHATML[:-12]), ("chat template", "no valid Jinja", "line")),
    ("template without answers", template("{{ messages[0]['content'] }}"), ("leaves answers out",)),
    ("template without questions", template("{{ messages[1]['content'] }}"), ("chat template", "target.chat_template")),
    ("template without anything", template("hello"), ("leaves answers out",)),
    ("template in Latin-1", template("ü".encode("latin-1") + CHATML.encode()), ("tokenizer", "UTF-8")),
    ("own template in UTF-16", own_template(CHATML.encode("utf-16")), ("own.jinja", "UTF-8")),
    ("own template missing", settings("target", chat_template="nowhere.jinja"), ("nowhere.jinja does not exist",)),
    # what the target rules out
    (
        "draft vocabulary too large",
        settings("vocab", draft_vocab_size=32000),
        ("vocab.draft_vocab_size", "300", "lower"),
    ),
    ("layer beyond the last", settings("extract", aux_layer_ids=[1, 3, 9]), ("extract.aux_layer_ids", "0..6")),
    ("draft of another width", settings("train", intermediate_size=48), ("train.init_from_target mlp", "[48, 32]")),
    # as people have them, and right
    ("shards", shards(lambda target: None), ()),
    ("vendor's own file beside it", consolidated, ()),
    ("layer of several tokens with copies", weights(mtp_layer), ()),
    ("tied, with a copy of the embedding", weights(equal_head, tie_word_embeddings=True), ()),
    (
        "packed, with engines that unpack",
        both(
            weights(packed, quantization_config=INT4),
            settings("sample", engine="vllm"),
            settings("extract", engine="vllm"),
            settings("train", init_from_target=["norm", "lm_head"]),
        ),
        (),
    ),
    ("two named templates and options", two_named_templates, ()),
    ("template with a byte order mark", template(b"\xef\xbb\xbf" + CHATML.encode()), ()),
    ("own template with a byte order mark", own_template(b"\xef\xbb\xbf" + CHATML.encode()), ()),
]
CASES = [BadInput("target", name, damage, ("fetch", "tiny"), words) for name, damage, words in DAMAGES]
