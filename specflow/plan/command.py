"""The `specflow plan` command: gathers what is known of a family, prints estimates, assumptions and warnings.

The formulas are `formulas.py`'s. Reads parameters, and of earlier stages target.json and metrics where they exist.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from specflow.config import Family, Params, load_params, parse_params
from specflow.errors import UserError
from specflow.files import read_json
from specflow.paths import Paths
from specflow.plan.facts import DEVICES, Device, Shape, read_config, shape_named
from specflow.plan.formulas import Assumptions, Estimate, estimate, largest_batch, least_gpus, weight_bytes
from specflow.stage import family_paths, listed_families
from specflow.targets.model import read_facts


@dataclass(frozen=True)
class Options:
    """What the command line overrides; None: not said."""

    device: str | None = None
    flops: float | None = None
    """FLOP/s."""
    bandwidth: float | None = None
    """Bytes/s."""
    device_memory_bytes: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    layer_s: float | None = None
    conversations: int | None = None
    prompt_tokens: float | None = None
    answer_tokens: float | None = None
    gpus: int | None = None
    shards: int | None = None
    config: Path | None = None
    online: bool = False


def plan_text(params_path: Path, name: str | None, recipe: Path | None, options: Options) -> str:
    """The plan of one family, of a recipe that is not in params.yaml yet, or of every listed family."""
    params = recipe_params(recipe) if recipe else load_params(params_path)
    names = [name] if name else (list(params.families) if recipe else listed_families(params))
    if not names:
        raise UserError("nothing to plan: name a family, or list one in offline or online of params.yaml")
    return "\n\n".join(
        plan_family(key, params.family(key), params, None if recipe else family_paths(key, params), options)
        for key in names
    )


def recipe_params(recipe: Path) -> Params:
    """The families of a recipe file as parameters of their own."""
    from specflow.params.file import read_recipe

    _, fragment = read_recipe(recipe)
    known = {key: value for key, value in fragment.items() if key in Params.model_fields}
    wanted = {name for family in known["families"].values() for name in family.get("bench", {}).get("prompt_sets", [])}
    missing = wanted - {"heldout"} - set(known.get("prompt_sets") or {})
    sets = {**(known.get("prompt_sets") or {}), **{name: {"source": "file:not-used"} for name in missing}}
    return parse_params({**known, "prompt_sets": sets}, where=str(recipe))


def plan_family(name: str, family: Family, params: Params, paths: Paths | None, options: Options) -> str:
    shape, shape_from = find_shape(family, paths, options.config)
    device = find_device(family, options)
    a = assume(family, shape, device, paths, options)
    online = options.online or name in params.online
    stages = estimate(family, shape, a, online=online)
    lines = [f"{name}: {shape.num_parameters / 1e9:.3g} B parameters ({shape_from})", *_table(stages, device), ""]
    lines += [f"  {line}" for line in assumption_lines(family, shape, a)]
    lines += [f"WARNING: {line}" for line in warnings(family, shape, a, stages)]
    return "\n".join(lines)


def find_shape(family: Family, paths: Paths | None, config: Path | None) -> tuple[Shape, str]:
    """Shape of the target, and where it is from: --config, the fetched target, or the table of the recipes' targets.

    Raises UserError where none of them knows it.
    """
    if config is not None:
        return read_config(config), str(config)
    if paths is not None and paths.target.exists():
        facts = read_facts(paths.target)
        file = paths.cache / facts.folder / "config.json"
        if file.exists():
            return read_config(file), "config.json of the fetched target"
    source = family.target.parts[0]
    if (shape := shape_named(source)) is not None:
        return shape, f"public shape of {shape.name}"
    raise UserError(f"plan: the shape of {source} is not known: run fetch first, or give its config.json with --config")


def find_device(family: Family, options: Options) -> Device:
    """The named device with the overrides; by default the one that the target's dtype is for."""
    name = options.device or ("cpu" if family.target.dtype == "float32" else "h100")
    if name not in DEVICES:
        raise UserError(f"plan: unknown device {name!r}: known are {', '.join(DEVICES)}; override with --flops, ...")
    given = {
        "flops": options.flops,
        "bandwidth": options.bandwidth,
        "memory_bytes": options.device_memory_bytes,
        "mfu": options.mfu,
        "mbu": options.mbu,
        "layer_s": options.layer_s,
    }
    return replace(DEVICES[name], **{key: value for key, value in given.items() if value is not None})


def assume(family: Family, shape: Shape, device: Device, paths: Paths | None, options: Options) -> Assumptions:
    """Counts and lengths: as given, else as measured by earlier stages, else half of what the limits allow."""
    prompt, answer, source = _lengths(family, paths)
    if options.prompt_tokens is not None or options.answer_tokens is not None:
        prompt, answer = options.prompt_tokens or prompt, options.answer_tokens or answer
        source = "given"
    train = options.conversations or family.data.train_conversations
    shards = options.shards or max((needs.shards or 1 for needs in family.resources.values()), default=1)
    return Assumptions(
        device=device,
        num_conversations=train + family.data.eval_conversations,
        num_train=train,
        prompt_tokens=prompt,
        answer_tokens=answer,
        gpus=options.gpus or least_gpus(family, shape, device),
        shards=shards,
        lengths_from=source,
    )


def _lengths(family: Family, paths: Paths | None) -> tuple[float, float, str]:
    """(prompt, answer) tokens per conversation and where they are from."""
    measured = _metrics(paths, "sample")
    if measured.get("rows"):
        rows = measured["rows"]
        return measured["prompt_tokens"] / rows, measured["generated_tokens"] / rows, "measured by sample"
    prompt, answer = family.data.max_prompt_tokens / 2, family.data.max_turns * family.sample.max_new_tokens / 2
    room = family.extract.max_length_tokens - prompt
    return prompt, min(answer, room), "assumed: half of the limits"


def _metrics(paths: Paths | None, stage: str) -> dict[str, Any]:
    if paths is None or not paths.metrics(stage).exists():
        return {}
    return dict(read_json(paths.metrics(stage), what="metrics", made_by=f"dvc repro {stage}@{paths.family}"))


def _table(stages: list[Estimate], device: Device) -> list[str]:
    header = ["stage", "disk", "RAM", "GPU memory", "GPU-hours", "time"]
    if device.is_cpu:
        header = ["stage", "disk", "RAM", "time"]
    total = Estimate(
        "all",
        sum(s.disk_bytes for s in stages),
        max(s.host_bytes for s in stages),
        max(s.device_bytes for s in stages),
        sum(s.device_s for s in stages),
        sum(s.wall_s for s in stages),
    )
    rows = [header, *(_row(stage, device) for stage in [*stages, total])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        for row in rows
    ]


def _row(stage: Estimate, device: Device) -> list[str]:
    time = duration_text(stage.wall_s)
    if device.is_cpu:
        return [stage.stage, bytes_text(stage.disk_bytes), bytes_text(stage.host_bytes + stage.device_bytes), time]
    gpu_hours = f"{stage.device_s / 3600:,.2f}" if stage.device_s else "-"
    memory = bytes_text(stage.device_bytes)
    return [stage.stage, bytes_text(stage.disk_bytes), bytes_text(stage.host_bytes), memory, gpu_hours, time]


def assumption_lines(family: Family, shape: Shape, a: Assumptions) -> list[str]:
    d = a.device
    peak = f"{d.flops / 1e12:.3g} TFLOP/s at {d.mfu:.0%}, {d.bandwidth / 1e9:,.0f} GB/s at {d.mbu:.0%}"
    launch = f", {d.layer_s * 1e3:g} ms a layer and forward" if d.layer_s else ""
    replicas = f"{a.gpus} device(s) a replica, {a.shards} replica(s) for sample and extract, 1 for train and bench"
    return [
        f"{a.num_conversations:,} conversations of {a.prompt_tokens:.0f} prompt + {a.answer_tokens:.0f} answer tokens "
        f"({a.lengths_from}): {a.tokens / 1e6:,.4g} M tokens",
        f"target in {family.target.dtype}: {bytes_text(weight_bytes(family, shape))}; "
        f"{shape.key_value_bytes(2 if family.target.dtype != 'float32' else 4):,} cache bytes a token; batch of "
        f"{family.sample.batch_size}",
        f"device {d.name}: {peak}{launch}",
        f"{replicas}; disk {a.disk_bytes_s / 1e9:g} GB/s a process, network {a.network_bytes_s / 1e6:g} MB/s",
        "bench at an acceptance length of 1; prepare, vocab, export and report take minutes",
        "every assumption can be overridden: `specflow plan --help`",
    ]


def warnings(family: Family, shape: Shape, a: Assumptions, stages: list[Estimate]) -> list[str]:
    """What cannot fit: replica on device, stage on device, disk and RAM of this machine."""
    lines = []
    in_process = [stage for stage in ("sample", "extract") if getattr(family, stage).engine == "transformers"]
    if a.gpus > 1:
        lines.append(
            f"the target needs {a.gpus} devices of {bytes_text(a.device.memory_bytes)}, but "
            f"{', '.join([*in_process, 'bench'])} run in one process on one device: the figures hold for an engine "
            "that splits it"
        )
    for stage in stages:
        if not a.device.is_cpu and stage.device_bytes > a.device.memory_bytes:
            lines.append(
                f"{stage.stage} needs {bytes_text(stage.device_bytes)} of device memory, the device has "
                f"{bytes_text(a.device.memory_bytes)}: {_smaller(stage.stage, family, shape, a)}"
            )
    disk, free = sum(stage.disk_bytes for stage in stages), shutil.disk_usage(Path()).free
    if disk > free:
        lines.append(
            f"the stages take {bytes_text(disk)}, the disk of this folder has {bytes_text(free)} free: fewer "
            "conversations, a larger disk, or train online"
        )
    has = psutil.virtual_memory().total
    for stage in stages:
        needed = stage.host_bytes + (stage.device_bytes if a.device.is_cpu else 0)
        if needed > has:
            lines.append(
                f"{stage.stage} needs {bytes_text(needed)} of memory, this machine has {bytes_text(has)}: "
                "run it on a larger one, or take fewer conversations"
            )
    return lines


def _smaller(stage: str, family: Family, shape: Shape, a: Assumptions) -> str:
    """What makes a stage take less device memory."""
    if stage == "sample":
        fits = largest_batch(family, shape, a)
        return f"sample.batch_size {fits} fits when every row is at its longest" if fits else "more --gpus"
    if stage.startswith("train"):
        return "lower train.batch_tokens (and raise train.accumulate), vocab.draft_vocab_size, or set fit_tokens to 0"
    return "lower extract.batch_tokens" if stage == "extract" else "more --gpus"


def bytes_text(count: float) -> str:
    """Decimal units, three digits; `-` for none."""
    if count <= 0:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for unit, size in (("d", 86400 * 2), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'd' else size):,.1f} {unit}"
    return f"{seconds:.0f} s"
