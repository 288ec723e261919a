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


STAGES = ("fetch", "prepare", "sample", "extract", "train", "bench")
"""Stages with inputs from outside; `train` is both ways to train."""


def of_family(family: Family, params: Params, paths: Paths) -> dict[str, Digests]:
    """Digests by stage. Raises UserError for what does not exist or cannot be read."""
    return {stage: of_stage(stage, family, params, paths) for stage in STAGES}


def of_stage(stage: str, family: Family, params: Params, paths: Paths) -> Digests:
    """Digests of what one stage reads. What was on record and is gone counts as it was: it is missed where it is read.

    Raises UserError as `of_family`.
    """
    cache, bench = paths.cache, family.bench
    known = _on_record(stage, paths)
    found: dict[str, Any] = {}
    libraries: tuple[str, ...] = ()
    if stage == "fetch":
        found = _sources([family.target], known, cache, models=True) | _files(family.target.chat_template, known, cache)
    if stage in ("fetch", "prepare"):
        found |= _sources([*family.data.sources, *params.prompt_sets.values()], known, cache)
        libraries = ("transformers",) if stage == "prepare" else ()
    elif stage == "sample":
        libraries = _libraries(family.sample.engine, family)
    elif stage == "extract":
        libraries = _libraries(family.extract.engine, family)
    elif stage == "train":
        found, libraries = _files(family.train.init_from, known, cache), ("torch", "transformers")
    elif stage == "bench":
        sets = [params.prompt_sets[key] for key in bench.prompt_sets if key != HELDOUT]
        assistant = bench.assistant and bench.assistant.removeprefix("file:")
        found = _sources(sets, known, cache) | _files(assistant, known, cache)
        libraries = ("torch", "transformers", *((bench.serve.engine,) if bench.serve else ()))
    versions = {each: _version(each, family, paths) or known.get(each) for each in libraries}
    return {"files": found, "versions": versions}


def write(found: dict[str, Digests], paths: Paths) -> list[str]:
    """Bring the files up to date; returns the stages whose inputs changed. What is as it was is not touched."""
    changed = [stage for stage, digests in found.items() if _recorded(paths.inputs(stage)) != digests]
    for stage in changed:
        files.write_json(paths.inputs(stage), found[stage])
    return changed


def are_current(found: dict[str, Digests], paths: Paths) -> bool:
    """Whether `write` would change nothing."""
    return all(_recorded(paths.inputs(stage)) == digests for stage, digests in found.items())


def check_unchanged(stage: str, family: Family, params: Params, paths: Paths) -> None:
    """Raise UserError where a file that `stage` is about to open is not the one that was on record under its name."""
    stage = "train" if stage.startswith("train_") else stage
    before = _recorded(paths.inputs(stage))
    if before is None:
        return
    now = of_stage(stage, family, params, paths)["files"]
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


def _on_record(stage: str, paths: Paths) -> dict[str, Any]:
    """What was last recorded for a stage by reference or library, here or at the project that this is a copy of."""
    for root in (paths.root, project_home(paths.root)):
        if (record := _recorded(Paths(root, paths.family, paths.cache).inputs(stage))) is not None:
            return {**record.get("versions", {}), **record.get("files", {})}
    return {}


def _flat(digests: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for reference, value in digests.items():
        if isinstance(value, str):
            yield reference, value
        else:
            yield from ((f"{reference}/{name}", digest) for name, digest in value.items())


def _sources(sources: Any, known: dict[str, Any], cache: Path, *, models: bool = False) -> dict[str, Any]:
    """Digests of `file:` sources. Others are pinned: by their sha256, or the commit that the cache holds."""
    found = {}
    for source in sources:
        assert isinstance(source, Source)
        if len(source.parts) == 1 and source.parts[0].startswith("file:"):
            found[source.parts[0]] = _digests(source.parts[0], known, cache, models=models)
    return found


def _files(reference: str | None, known: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Digest of a file, or of the model in a folder, that is named by its path; nothing for a hub name."""
    if reference is None or reference.startswith(("hf:", "pypi:")):
        return {}
    return {reference: _digests(reference, known, cache, models=True)}


def _digests(reference: str, known: dict[str, Any], cache: Path, *, models: bool) -> Any:
    path = outside(reference.removeprefix("file:"))
    try:
        if path.is_dir():
            return {str(file.relative_to(path)): files.digest_of(file, cache) for file in _walk(path, models)}
        return files.digest_of(path, cache)
    except (FileNotFoundError, NotADirectoryError):
        if reference in known:
            return known[reference]
        raise UserError(
            f"{reference} does not exist: check the path (relative paths start at the project folder)"
        ) from None
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{reference} cannot be read ({error}): check the path and its rights") from None


def _walk(folder: Path, models: bool) -> Iterator[Path]:
    """Files of a folder in order, hidden ones, pipes and links to nothing left out; of a model only what is loaded from
    its top.
    """
    for parent, folders, names in os.walk(folder, followlinks=not models):
        here = Path(parent)
        folders[:] = [] if models else sorted(each for each in folders if not each.startswith("."))
        for each in folders:
            if (here / each).resolve() in (here.resolve(), *here.resolve().parents):
                raise UserError(f"{here / each} is a link to a folder that it lies in: remove it")
        for each in sorted(names):
            wanted = not each.startswith(".") and (not models or each.endswith(_MODEL_SUFFIXES))
            if wanted and (here / each).is_file():  # a pipe would be waited for
                yield here / each


def _libraries(engine: str, family: Family) -> tuple[str, ...]:
    if engine == "transformers":
        return ("torch", "transformers")
    if engine == "dataset" or family.serve.url is not None:  # the other machine's versions are not ours to know
        return ("transformers",)
    return ("transformers", engine)


def _version(library: str, family: Family, paths: Paths) -> str | None:
    """Version without its local part: +cpu and +cu130 give the same results but for rounding, as two devices do.

    None where an engine is not on this machine.
    """
    if library in ("vllm", "sglang"):
        from specflow.serving.engines import find_install

        try:
            return find_install(library, family.serve, paths.cache).version.partition("+")[0]
        except UserError:
            return None
    return metadata.version(library).partition("+")[0]
