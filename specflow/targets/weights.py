"""The weights of a checkpoint folder: which files every engine loads, and where in them each tensor lies.

The one reader of weights files. What a tensor's place and shape are, the files' own headers say, never the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that stands for another one in a git repository cloned without LFS."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' words: F32, BF16, I8, ..."""

    @property
    def is_float(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")


def weight_files(folder: Path) -> list[Path]:
    """Files that the model is loaded from, whichever engine loads it; vendors' own files beside them are not.

    Raises UserError where there are none, one is missing, or transformers and vLLM would load different ones: of one
    file and an index beside it, transformers takes the file and vLLM what the index names.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if single.is_symlink() and not single.exists():
            raise UserError(
                f"{single} is a link to {single.readlink()}, which is not there: fetch the checkpoint again"
            )
        if not single.is_file():
            raise UserError(
                f"{folder} has no safetensors weights ({SINGLE}, or shards and {INDEX}): "
                "convert the checkpoint (save_pretrained of transformers does)"
            )
        return [single]
    names = sorted(set(_read_index(index).values()))
    if single.is_file() and names != [SINGLE]:
        raise UserError(
            f"{folder} has {SINGLE} and beside it {INDEX}, which names other files: transformers would load the one, "
            "vLLM the others; remove what is not the target"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{len(missing)} of {len(names)} weights files that {INDEX} names are not in {folder}, {missing[0]} first: "
            "fetch the checkpoint again, whole"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint by name, from the files' headers alone.

    Raises UserError for a file that is damaged or cut off, a tensor that lies in two files, or not in the one that the
    index names.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in found:
                    raise UserError(
                        f"tensor {name!r} lies in {found[name].file.name} and in {file.name} of {folder}: remove the "
                        "file that is not the target's"
                    )
                header = tensors.get_slice(name)
                found[name] = StoredTensor(file, tuple(header.get_shape()), header.get_dtype())
    index = folder / INDEX
    for name, file_name in _read_index(index).items() if index.is_file() else ():
        if name in found and found[name].file.name != file_name:
            raise UserError(
                f"{index} says that tensor {name!r} is in {file_name}, but it is in {found[name].file.name}: "
                "fetch the checkpoint again, all files at the same revision"
            )
    return found


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of the checkpoint, in the dtype that it is stored in; no other is read."""
    for file in weight_files(folder):
        with _opened(file) as tensors:
            if name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor: torch.Tensor = tensors.get_tensor(name)
                return tensor
    raise UserError(f"{folder} has no tensor {name!r}, which it had when it was fetched: run fetch again")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint. Raises UserError, with the cause, for whatever else the file holds."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): fetch it again") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it is damaged or cut off, fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, got {type(value).__name__}: fetch it again")
    return value


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} has no weight_map of tensor names and files: fetch it again")
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]!r}, which is no file of that folder: correct it")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` there") from None
        raise UserError(f"{file} is damaged or cut off ({error}): fetch it again") from None
    with tensors:
        yield tensors
