"""Drafts of other trainers whose files are damaged or contradict themselves: each is one line when it is read.

They are folders, not projects: a draft is met by training, after sampling, so each is read as `train.init_from` reads
it, beside a target.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specflow.export.eagle3 import save_export
from tests.captures import TinyProject, tiny_project
from tests.toys import make_tiny_target
from tests.unit.export.test_imports import make_draft

Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class BadDraft:
    """One way in which the folder of a draft is wrong."""

    name: str
    damage: Callable[[Path], None]
    words: tuple[str, ...]
    """Words that the line must have."""


def project_with_draft(folder: Path) -> tuple[TinyProject, Path]:
    """A project beside a target, and the folder of a sound draft of it."""
    made = tiny_project(folder / "project", make_tiny_target(folder / "target"))
    draft = make_draft(made.facts, aux_layer_ids=made.facts.default_aux_layer_ids())
    exported = made.paths.export / "eagle3"
    save_export(draft, made.facts, exported)
    return made, exported


def copy_draft(exported: Path, folder: Path) -> Path:
    return Path(shutil.copytree(exported, folder))


def tensors(name: str, change: Callable[[Tensors], object], *words: str) -> BadDraft:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file({key: value.contiguous() for key, value in found.items()}, file, metadata={"format": "pt"})

    return BadDraft(name, damage, words)


def config(name: str, change: Callable[[Config], object], *words: str) -> BadDraft:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return BadDraft(name, damage, words)


def bytes_of(name: str, file: str, change: Callable[[bytes], bytes], *words: str) -> BadDraft:
    return BadDraft(
        name, lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None, words
    )


def _nan(found: Tensors) -> None:
    found["fc.weight"][3, 5] = float("nan")


def _infinite(found: Tensors) -> None:
    found["lm_head.weight"][0, 0] = float("inf")


def _pickled(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
Q = "midlayer.self_attn.q_proj.weight"
CASES = [
    tensors("d2t as arange against t2d", lambda t: t.update(d2t=torch.arange(len(t["d2t"]))), "contradict", "t2d"),
    tensors("d2t all zero against t2d", lambda t: t["d2t"].zero_(), "contradict"),
    tensors("t2d of another vocabulary", lambda t: t.update(t2d=torch.ones(299, dtype=torch.bool)), "t2d has 299"),
    tensors("t2d as floats", lambda t: t.update(t2d=t["t2d"].float()), "t2d is float32"),
    tensors("d2t beyond the vocabulary", lambda t: t["d2t"].add_(10**6), "distinct tokens"),
    tensors("d2t below zero", lambda t: t["d2t"].sub_(10**6), "distinct tokens"),
    tensors("d2t names a token twice", lambda t: t["d2t"].__setitem__(1, t["d2t"][0] - 1), "distinct tokens"),
    tensors("d2t too short", lambda t: t.update(d2t=t["d2t"][:-1]), "d2t has 99"),
    tensors("d2t of two dimensions", lambda t: t.update(d2t=t["d2t"][None]), "d2t is int64 of shape"),
    tensors("d2t as floats", lambda t: t.update(d2t=t["d2t"].float()), "d2t is float32"),
    tensors("no d2t", lambda t: t.pop("d2t"), "d2t has None"),
    tensors("weights in int8", lambda t: t.update({Q: t[Q].to(torch.int8)}), "int8", "quantised"),
    tensors("weights in float8", lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "float8", "quantised"),
    tensors("NaN", _nan, "fc.weight", "nan"),
    tensors("infinity", _infinite, "lm_head.weight", "infinity"),
    tensors("a tensor is missing", lambda t: t.pop(Q), "missing tensors", "q_proj"),
    tensors("a tensor too many", lambda t: t.update(extra=torch.ones(1)), "extra", "no place"),
    tensors("a tensor of another shape", lambda t: t.update({Q: t[Q][:, :-1]}), "q_proj", "expected"),
    tensors("no head", lambda t: t.pop("lm_head.weight"), "no EAGLE-3 draft"),
    tensors("a head of another vocabulary", lambda t: t.update({"lm_head.weight": torch.ones(77, 32)}), "d2t has 100"),
    config("another target's vocabulary", lambda c: c.update(vocab_size=999), "another target"),
    config("two layers", lambda c: c.update(num_hidden_layers=2), "one layer"),
    config("no heads", lambda c: c.update(num_attention_heads=0), "config.json"),
    config("a width in words", lambda c: c.update(hidden_size="wide"), "config.json", "Llama"),
    config("an unknown activation", lambda c: c.update(hidden_act="swish9"), "swish9"),
    config("layer ids in words", lambda c: c.update(eagle_aux_hidden_state_layer_ids="all"), "layer"),
    config("layer ids that descend", lambda c: c.update(eagle_aux_hidden_state_layer_ids=[5, 3, 2]), "ascend"),
    config("layer ids beyond the target", lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 3, 99]), "0..6"),
    config("an unknown form", lambda c: c.update(speculators_model_type="dflash"), "only eagle3"),
    config("half a speculators form", lambda c: c.update(speculators_model_type="eagle3"), "transformer_layer_config"),
    bytes_of("config is an LFS pointer", "config.json", lambda raw: LFS, "Git LFS pointer", "git lfs pull"),
    bytes_of("config cut off", "config.json", lambda raw: raw[:40], "no JSON"),
    bytes_of("config in UTF-16", "config.json", lambda raw: b"\xff\xfe" + b"\x00" * 8, "no JSON"),
    bytes_of("config is a list", "config.json", lambda raw: b"[]", "expected an object"),
    bytes_of("weights are an LFS pointer", "model.safetensors", lambda raw: LFS, "Git LFS pointer", "git lfs pull"),
    bytes_of("weights cut off", "model.safetensors", lambda raw: raw[: len(raw) // 2], "cannot be read"),
    bytes_of("no weights in it", "model.safetensors", lambda raw: b"", "cannot be read"),
    BadDraft("no config", lambda folder: (folder / "config.json").unlink(), ("config.json is missing",)),
    BadDraft("no weights", lambda folder: (folder / "model.safetensors").unlink(), ("neither model.safetensors",)),
    BadDraft("a pickle of code", _pickled(print), ("cannot be read",)),
    BadDraft("a pickle of a list", _pickled([1, 2]), ("holds a list",)),
    BadDraft("a pickle of no tensor", _pickled({"fc.weight": 3}), ("fc.weight is a int",)),
]
