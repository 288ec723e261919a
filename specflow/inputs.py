"""What a family's stages read from outside the project, by digest, where DVC sees it: artifacts/F/inputs/STAGE.json.

A parameter names a file or a folder; DVC sees the name. `specflow inputs`, a stage that DVC always runs, writes what is
there under that name, and the versions of the libraries that shape a stage's results, into a file that the stage
depends on. Digests are remembered by size and times, so where nothing changed nothing is read. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from specflow import files
from specflow.config import Family, Params, Source
from specflow.config_bench import HELDOUT
from specflow.errors import UserError
from specflow.paths import Paths, outside, project_home

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".bin")
Digests = dict[str, Any]
"""{"files": {reference as in params.yaml: sha256, or {file in that folder: sha256}}, "versions": {library: version}}"""


def of_family(name: str, family: Family, params: Params, paths: Paths) -> dict[str, Digests]:
    """Digests by stage. Raises UserError for what does not exist or cannot be read."""
    target, cache = family.target, paths.cache
    prompt_sets = {key: params.prompt_sets[key] for key in family.bench.prompt_sets if key != HELDOUT}
    model = _sources([target], cache, models=True) | _files(target.chat_template, cache)
    data = _sources([*family.data.sources, *params.prompt_sets.values()], cache)
    assistant = family.bench.assistant
    found = {
        "fetch": (model | data, ()),
        "prepare": (data, ("transformers",)),
        "sample": ({}, _libraries(family.sample.engine, family)),
        "extract": ({}, _libraries(family.extract.engine, family)),
        "train": (_files(family.train.init_from, cache), ("torch", "transformers")),
        "bench": (
            _sources(prompt_sets.values(), cache) | _files(assistant and assistant.removeprefix("file:"), cache),
            ("torch", "transformers", *((family.bench.serve.engine,) if family.bench.serve else ())),
        ),
    }
    return {
        stage: {"files": digests, "versions": {each: _version(each, stage, family, paths) for each in libraries}}
        for stage, (digests, libraries) in found.items()
    }


def write(found: dict[str, Digests], paths: Paths) -> list[str]:
    """Bring the files up to date; returns the stages whose inputs changed. What is as it was is not touched."""
    changed = [stage for stage, digests in found.items() if _recorded(paths.inputs(stage)) != digests]
    for stage in changed:
        files.write_json(paths.inputs(stage), found[stage])
    return changed


def are_current(found: dict[str, Digests], paths: Paths) -> bool:
    """Whether `write` would change nothing."""
    return all(_recorded(paths.inputs(stage)) == digests for stage, digests in found.items())


def check_unchanged(stage: str, name: str, family: Family, params: Params, paths: Paths) -> None:
    """Raise UserError where a file that `stage` is about to open is not the one that was on record under its name."""
    stage = "train" if stage.startswith("train_") else stage
    before = _recorded(paths.inputs(stage))
    if before is None:
        return
    now = of_family(name, family, params, paths)[stage]["files"]
    asked = {reference: digests for reference, digests in before["files"].items() if reference in now}
    old, new = dict(_flat(asked)), dict(_flat({reference: now[reference] for reference in asked}))
    if different := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise UserError(f"{different[0]}{more} changed since it was fetched: run `dvc repro`, which reads it anew")


def _recorded(path: Path) -> Digests | None:
    try:
        found: Digests = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, ValueError):  # a damaged one is written anew
        return None


def _flat(digests: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for reference, value in digests.items():
        if isinstance(value, str):
            yield reference, value
        else:
            yield from ((f"{reference}/{name}", digest) for name, digest in value.items())


def _sources(sources: Any, cache: Path, *, models: bool = False) -> dict[str, Any]:
    """Digests of `file:` sources. Others are pinned: by their sha256, or the commit that the cache holds."""
    found = {}
    for source in sources:
        assert isinstance(source, Source)
        if len(source.parts) == 1 and source.parts[0].startswith("file:"):
            found[source.parts[0]] = _digests(source.parts[0].removeprefix("file:"), cache, models=models)
    return found


def _files(reference: str | None, cache: Path) -> dict[str, Any]:
    """Digest of a file, or of the model in a folder, that is named by its path; nothing for a hub name."""
    if reference is None or reference.startswith(("hf:", "pypi:")):
        return {}
    return {reference: _digests(reference, cache, models=True)}


def _digests(reference: str, cache: Path, *, models: bool) -> Any:
    path = outside(reference)
    try:
        if path.is_dir():
            return {str(file.relative_to(path)): files.digest_of(file, cache) for file in _walk(path, models)}
        return files.digest_of(path, cache)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"file:{reference} does not exist: check the path (relative paths start at the project folder)"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"file:{reference} cannot be read ({error}): check the path and its rights") from None


def _walk(folder: Path, models: bool) -> Iterator[Path]:
    """Files of a folder in order, hidden ones left out; of a model only what is loaded from its top."""
    for parent, folders, names in os.walk(folder, followlinks=not models):
        here = Path(parent)
        folders[:] = [] if models else sorted(each for each in folders if not each.startswith("."))
        for each in folders:
            if (here / each).resolve() in (here.resolve(), *here.resolve().parents):
                raise UserError(f"{here / each} is a link to a folder that it lies in: remove it")
        for each in sorted(names):
            if not each.startswith(".") and (not models or each.endswith(_MODEL_SUFFIXES)):
                yield here / each


def _libraries(engine: str, family: Family) -> tuple[str, ...]:
    if engine == "transformers":
        return ("torch", "transformers")
    if engine == "dataset" or family.serve.url is not None:  # the other machine's versions are not ours to know
        return ("transformers",)
    return ("transformers", engine)


def _version(library: str, stage: str, family: Family, paths: Paths) -> str | None:
    """Version without its local part: +cpu and +cu130 give the same results but for rounding, as two devices do."""
    if library in ("vllm", "sglang"):
        from specflow.serving.engines import find_install

        try:
            return find_install(library, family.serve, paths.cache).version.partition("+")[0]
        except UserError:  # not on this machine: what another one measured with stays
            for root in (paths.root, project_home(paths.root)):
                record = _recorded(Paths(root, paths.family, paths.cache).inputs(stage)) or {}
                if version := record.get("versions", {}).get(library):
                    return str(version)
            return None
    return metadata.version(library).partition("+")[0]
