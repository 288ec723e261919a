"""What one benchmark measures, and with which files: all that its numbers depend on, as a record that can be kept.

The stage makes a job from its family, `specflow bench --output` from its options; both are measured by the same code,
in this process or in workers that read the job from its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from specflow import files
from specflow.bench.identity import draft_digest
from specflow.config import Family, Params, Target
from specflow.config_bench import HELDOUT, Bench, Mode
from specflow.errors import UserError
from specflow.paths import Paths, outside
from specflow.schema import Section
from specflow.sources import resolve
from specflow.targets.model import TargetFacts, read_facts

_SHOWN = 4
"""Differing settings that an error names."""


class Job(Section):
    name: str
    """Family, or name of the target."""
    bench: Bench
    mode: Mode = "both"
    questions: tuple[int, int | None] | None = None
    """Of each prompt set only these, [begin, end) by place in the file; num_prompts is not read then."""
    target: TargetFacts
    draft: Path | None
    """Folder of an EAGLE-3 draft; None: `assistant` drafts, or nobody does."""
    foreign: bool = False
    """The draft may be in any layout that export/imports.py reads, not ours alone."""
    assistant: Path | None = None
    """Folder of an independent draft model: a reference row beside `draft`."""
    prompts: dict[str, Path] = {}  # noqa: RUF012 - pydantic copies it
    """File of each prompt set."""
    heldout: Path | None = None
    """Held-out conversations: the prompt set of that name, and what K is chosen on."""
    digests: dict[str, str] = {}  # noqa: RUF012
    """sha256 of the files above, by field or prompt set."""
    gpus_per_model: int = 1
    on_other_machine: Literal["again", "refuse"] = "again"
    """What becomes of a log that another machine or version left: measured again, or refused."""
    root: Path
    """Project folder, whose commit is recorded."""
    cache: Path
    state: Path
    """Folder of the resume logs, which are named `bench`."""
    output: Path
    """Folder of records.jsonl and summary.json."""

    @property
    def has_draft(self) -> bool:
        return self.mode != "baseline"

    def write(self, path: Path) -> None:
        files.write_text(path, self.model_dump_json(indent=2) + "\n")

    def differences(self, earlier: Job) -> list[str]:
        """`setting before -> now` of all that makes another benchmark of this one; where files lie does not."""
        return differences(*(job.model_dump(mode="json", exclude=_PLACES) for job in (earlier, self)))


_PLACES = {"draft", "assistant", "prompts", "heldout", "root", "cache", "state", "output"}
"""Fields that say where files are; what is in them stands in `digests` and `target`."""


def read_job(path: Path) -> Job:
    raw = files.read_json(path, what="benchmark", made_by="specflow bench --output <folder>")
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} is no benchmark of this version ({where}): give another folder") from None


def check_same(job: Job, earlier: Job, path: Path) -> None:
    """Raise UserError naming what differs, unless `job` goes on where `earlier` stopped."""
    if different := job.differences(earlier):
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise UserError(
            f"{path} was made with other settings ({'; '.join(different[:_SHOWN])}{more}): "
            "give the same ones to resume it, or another folder"
        )


def family_job(name: str, family: Family, params: Params, paths: Paths) -> Job:
    """The job of the bench stage. Prompt sets are fetched where they are not in the cache."""
    bench = family.bench
    prompts = {key: resolve(params.prompt_sets[key], paths.cache) for key in bench.prompt_sets if key != HELDOUT}
    heldout = paths.prompts / "eval.jsonl" if bench.sweeps or HELDOUT in bench.prompt_sets else None
    return with_digests(
        Job(
            name=name,
            bench=bench,
            target=read_facts(paths.target),
            draft=paths.export / "eagle3",
            assistant=assistant_folder(bench, paths.cache),
            prompts=prompts,
            heldout=heldout,
            root=paths.root,
            cache=paths.cache,
            state=paths.state,
            output=paths.bench,
        )
    )


def assistant_folder(bench: Bench, cache: Path) -> Path | None:
    """Folder of the independent draft model: a path, or a source as in target.source."""
    if bench.assistant is None:
        return None
    folder = outside(bench.assistant)
    return folder if folder.is_dir() else resolve(Target(source=bench.assistant), cache)


def with_digests(job: Job) -> Job:
    """The job with the digests of its files, by which a resumed one is known to be the same."""
    found = {f"prompts.{name}": _digest(path, job.cache) for name, path in job.prompts.items()}
    if job.heldout is not None and job.heldout.exists():
        found["heldout"] = files.sha256_file(job.heldout)
    if job.draft is not None:
        found["draft"] = draft_digest(job.draft)
    if job.assistant is not None:
        parts = sorted([*job.assistant.glob("*.safetensors"), *job.assistant.glob("*.json")])
        found["assistant"] = files.sha256_json({part.name: files.digest_of(part, job.cache) for part in parts})
    return job.model_copy(update={"digests": found})


def _digest(path: Path, cache: Path) -> str:
    """Of a file, or of all files of a folder."""
    if path.is_file():
        return files.digest_of(path, cache)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return files.sha256_json({str(file.relative_to(path)): files.digest_of(file, cache) for file in inside})


def differences(before: Any, now: Any) -> list[str]:
    """`a.b before -> now` of every value in which two JSON-able values differ."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
