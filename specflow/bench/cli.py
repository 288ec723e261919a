"""The command line of `specflow bench`: the stage of a family, or with --output a benchmark of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from specflow.errors import UserError

Command = Callable[..., Any]
_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=1)


class _Drafted(click.ParamType):
    """K: a number, or auto."""

    name = "K|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
            return "auto" if value == "auto" else int(value)
        self.fail(f"{value!r} is neither a number above 0 nor auto", param, ctx)


_OPTIONS = [
    click.option("--output", type=_FOLDER, help="Measure into this folder and change no artifact."),
    click.option("--resume", is_flag=True, help="Go on where a benchmark in that folder stopped."),
    click.option("--target", help="Folder or source (hf:, pypi:, file:) of the target, instead of the family's."),
    click.option("--target-sha256", help="Its digest, for a source that needs one."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype of --target."),
    click.option("--draft", type=_FOLDER, help="EAGLE-3 draft in any known layout, instead of the family's export."),
    click.option("--assistant", help="A small model with the target's tokenizer: a reference row, or the draft."),
    click.option("--prompts", multiple=True, help="Prompt set of params.yaml, heldout, or a file; repeatable."),
    click.option("--num-prompts", type=_COUNT, help="Questions per set, taken evenly over it."),
    click.option("--question-begin", type=click.IntRange(min=0), help="First question of each set, from 0."),
    click.option("--question-end", type=click.IntRange(min=0), help="The one behind the last."),
    click.option("--mode", type=click.Choice(["both", "baseline", "draft"]), default="both", show_default=True,
                 help="Sides that run; one alone claims no speedup."),
    click.option("--num-speculative-tokens", "-k", type=_Drafted(), help="A chain of K drafted tokens."),
    click.option("--total-token", type=click.IntRange(min=2), help="A tree of this many tokens, its root included."),
    click.option("--depth", type=_COUNT, help="Most drafted tokens on a path of the tree."),
    click.option("--tree-top-k", type=_COUNT, help="Branches kept at each level of the tree."),
    click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Of sampling; 1: off."),
    click.option("--top-k", type=click.IntRange(min=0), help="Of sampling; 0: off."),
    click.option("--num-samples", type=_COUNT, help="Answers to each question."),
    click.option("--seed", type=click.IntRange(min=0), help="Of sampling."),
    click.option("--max-new-tokens", type=_COUNT, help="Per turn, on both sides."),
    click.option("--max-turns", type=_COUNT, help="Turns of a question that are asked."),
    click.option("--repeats", type=click.IntRange(min=3), help="Passes over every prompt."),
    click.option("--batch-size", "-b", type=_COUNT, multiple=True, help="Requests at once, also; repeatable."),
    click.option("--references/--no-references", default=None,
                 help="Prompt lookup, the always right and always wrong drafts, stock generate()."),
    click.option("--accuracy", multiple=True, help="Prompt set whose answers are scored; repeatable."),
    click.option("--execute-code", is_flag=True, help="Scoring may run code that the model wrote."),
    click.option("--gpus-per-model", type=_COUNT, help="GPUs of one copy of the target [default: 1 where there are]."),
    click.option("--gpus-total", type=_COUNT, help="GPUs in all: one worker for each copy of the target."),
    click.option("--workers", type=_COUNT, help="Processes that share the questions, where there are no GPUs."),
]  # fmt: skip


def _with_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def bench_command(summary: str, params_option: Command, parent_option: Command) -> click.Command:
    @click.command("bench", help=f"{summary} With --output any target and draft, without changing an artifact.")
    @click.argument("family", required=False)
    @_with_options
    @params_option
    @parent_option
    def bench(
        family: str | None,
        params_path: Path,
        parent_run_id: str | None,
        output: Path | None,
        resume: bool,
        **options: Any,
    ) -> None:
        from specflow.stage import exit_on_sigterm, run_stage

        unset = {"mode": "both", "execute_code": False}
        given = {name: value for name, value in options.items() if value not in (None, ()) and unset.get(name) != value}
        if output is None:
            if family is None:
                raise UserError("Missing argument 'FAMILY': name one, or give --output for a benchmark of its own")
            if given or resume:
                name = f"--{next(iter(given), 'resume').replace('_', '-')}"
                raise UserError(
                    f"{name} is for a benchmark of its own: add --output DIR, or set families.{family}.bench in "
                    "params.yaml for the stage"
                )
            exit_on_sigterm()
            run_stage("bench", family, params_path, parent_run_id=parent_run_id)
            return
        from specflow.bench.command import benchmark

        exit_on_sigterm()
        for line in benchmark(family, params_path, output, given, resume=resume):
            click.echo(line)

    return bench


@click.command("bench-worker", hidden=True)
@click.argument("folder", type=_FOLDER)
@click.option("--index", type=click.IntRange(min=0), default=0)
@click.option("--count", type=click.IntRange(min=2), required=True)
@click.option("--first", is_flag=True, help="Only what is measured once before the shares.")
def bench_worker(folder: Path, index: int, count: int, first: bool) -> None:
    """Measure one share of the questions of the benchmark in FOLDER; prints costs as JSON. Ends with its parent."""
    from specflow.bench.command import work_on
    from specflow.sharding.launch import end_with_parent
    from specflow.sharding.shares import Share
    from specflow.stage import exit_on_sigterm

    exit_on_sigterm()
    end_with_parent()
    click.echo(json.dumps(work_on(folder, Share(index, count), first=first)))
