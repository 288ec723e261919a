"""The `specflow` command: one subcommand per DVC stage, and a few for the project. Imports nothing heavy at the top."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from specflow import __version__
from specflow.bench.cli import bench_command, bench_worker
from specflow.errors import RetryableError, UserError

SUMMARIES = {
    "fetch": "Fetch the target and the data; record digests and shape.",
    "prepare": "Read conversations, drop what is unusable, split into train and eval.",
    "sample": "Let the target answer every user turn.",
    "vocab": "Choose the draft vocabulary from the training answers.",
    "extract": "Capture the target's hidden states into the store.",
    "train_offline": "Train the draft from the hidden-state store.",
    "train_online": "Train the draft with the target's forward on the fly.",
    "export": "Write the draft in the form that vLLM and SGLang load.",
    "bench": "Measure the target with and without the draft.",
}

params_option = click.option(
    "--params",
    "params_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="Parameters of the project; artifacts go to the current folder.",
)
parent_option = click.option(
    "--parent-run-id", help="MLflow run to nest this one in (default: that of the running `dvc repro`)."
)


class StageOrder(click.Group):
    """Lists the subcommands in the order in which the pipeline runs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=StageOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="specflow")
def cli() -> None:
    """Train, export and honestly benchmark speculative-decoding draft models.

    `dvc repro` runs every stage whose inputs changed; each can be run alone by the commands below.
    """


@cli.command()
@params_option
def init(params_path: Path) -> None:
    """Make this folder ready: DVC settings, MLflow store, one experiment per family."""
    from specflow.project import init_project

    for line in init_project(Path(), params_path):
        click.echo(line)


@cli.command("add-family")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="Name of the family here (default: the recipe's).")
@click.option("--accept-terms", is_flag=True, help="You read the licence terms that the recipe names.")
@click.option("--list", "list_them", is_flag=True, help="List the recipes in recipes/ and stop.")
@params_option
def add_family(recipe: Path | None, name: str | None, accept_terms: bool, list_them: bool, params_path: Path) -> None:
    """Put the family of RECIPE (a file of recipes/) into params.yaml."""
    from specflow.params.recipes import add_recipe, list_recipes

    if list_them:
        lines = list_recipes(Path("recipes"))
    elif recipe is None:
        raise UserError("name a recipe, as in `specflow add-family recipes/<file>`: --list shows them")
    else:
        lines = add_recipe(params_path, recipe, name=name, accept_terms=accept_terms)
    for line in lines:
        click.echo(line)


@cli.command()
@click.argument("family")
@params_option
def inputs(family: str, params_path: Path) -> None:
    """Note the digests of what FAMILY reads from outside the project, so that `dvc repro` sees what changed."""
    from specflow.stage import run_inputs

    run_inputs(family, params_path)


def _add_stage(stage: str, summary: str) -> None:
    @cli.command(stage, help=summary)
    @click.argument("family")
    @params_option
    @parent_option
    def command(family: str, params_path: Path, parent_run_id: str | None) -> None:
        from specflow.stage import exit_on_sigterm, run_stage

        exit_on_sigterm()
        run_stage(stage, family, params_path, parent_run_id=parent_run_id)


for _stage, _summary in SUMMARIES.items():
    if _stage == "bench":
        cli.add_command(bench_command(_summary, params_option, parent_option))
    else:
        _add_stage(_stage, _summary)
cli.add_command(bench_worker)


@cli.command()
@params_option
@parent_option
def report(params_path: Path, parent_run_id: str | None) -> None:
    """Write report/report.html over all families, a page for each beside it, and Markdown of both."""
    from specflow.stage import exit_on_sigterm, run_report

    exit_on_sigterm()
    run_report(params_path, parent_run_id=parent_run_id)


@cli.command()
@click.argument("family", required=False)
@params_option
@click.option("--recipe", type=click.Path(path_type=Path, dir_okay=False), help="Plan the family of a recipe file.")
@click.option("--config", type=click.Path(path_type=Path), help="Target's config.json, or a name such as Qwen3-8B.")
@click.option("--device", help="Assumed device: h200, h100, a100, l40s or cpu (default by target.dtype).")
@click.option("--flops", type=click.FloatRange(min=0, min_open=True), help="Its peak FLOP/s.")
@click.option("--bandwidth", type=click.FloatRange(min=0, min_open=True), help="Its memory's bytes/s.")
@click.option("--device-memory-gb", type=click.FloatRange(min=0, min_open=True), help="Its memory, 10^9 bytes.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak FLOP/s reached.")
@click.option("--mbu", type=click.FloatRange(0, 1, min_open=True), help="Share of the bandwidth reached in decoding.")
@click.option("--layer-ms", type=click.FloatRange(min=0), help="Launch time of a layer per forward.")
@click.option("--conversations", type=click.IntRange(min=1), help="Training conversations, instead of the parameter.")
@click.option("--prompt-tokens", type=click.FloatRange(min=1), help="Mean prompt tokens of a conversation, all turns.")
@click.option("--answer-tokens", type=click.FloatRange(min=1), help="Mean answer tokens of a conversation, all turns.")
@click.option("--gpus", type=click.IntRange(min=1), help="Devices of one replica of the target.")
@click.option("--shards", type=click.IntRange(min=1), help="Replicas that sample and extract side by side.")
@click.option("--online", is_flag=True, help="Plan train_online instead of extract and train_offline.")
def plan(
    params_path: Path,
    family: str | None,
    recipe: Path | None,
    device_memory_gb: float | None,
    layer_ms: float | None,
    **options: Any,
) -> None:
    """Print disk, memory and time of every stage before anything runs, and the assumptions behind them."""
    from specflow.plan.command import Options, plan_text

    memory_bytes = None if device_memory_gb is None else device_memory_gb * 1e9
    layer_s = None if layer_ms is None else layer_ms / 1e3
    given = Options(device_memory_bytes=memory_bytes, layer_s=layer_s, **options)
    click.echo(plan_text(params_path, family, recipe, given))


@cli.command(hidden=True)
@click.argument("stage", type=click.Choice(["sample", "extract", "bench"]))
@click.argument("family")
@params_option
@click.option("--index", type=click.IntRange(min=0), default=0, help="Number of the share, from 0.")
@click.option("--count", type=click.IntRange(min=2), required=True, help="Number of shares.")
@click.option("--first", is_flag=True, help="Only what is measured once before the shares.")
@click.option("--tied", is_flag=True, help="End when standard input closes.")
def shard(stage: str, family: str, params_path: Path, index: int, count: int, first: bool, tied: bool) -> None:
    """Do one share of a stage's rows and leave them in the resume state; prints rates and costs as JSON."""
    import json

    from specflow.sharding.launch import end_with_parent
    from specflow.sharding.shares import Share
    from specflow.stage import exit_on_sigterm, run_share

    exit_on_sigterm()
    if tied:
        end_with_parent()
    click.echo(json.dumps(run_share(stage, family, params_path, Share(index, count), first=first)))


@cli.command()
@params_option
def results(params_path: Path) -> None:
    """Print the short table of what was measured, and where the report is."""
    from specflow.project import results_text

    click.echo(results_text(params_path))


@cli.command()
@click.argument("family")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port on loopback.")
@click.option("--num-speculative-tokens", "-k", type=click.IntRange(min=1), help="A chain of this many drafted tokens.")
@click.option("--draft/--no-draft", default=None, help="With the exported draft, or the target alone.")
@click.option("--engine", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True)
@click.option("--print-only", is_flag=True, help="Print the command and stop.")
@params_option
def serve(
    family: str,
    port: int,
    num_speculative_tokens: int | None,
    draft: bool | None,
    engine: str,
    print_only: bool,
    params_path: Path,
) -> None:
    """Serve the target of FAMILY with its exported draft; prints the command to copy.

    Drafts as serve.speculative says, which `specflow tune` writes, else export.num_speculative_tokens.
    """
    from specflow.serving.family import launch_for, serve_until_stopped
    from specflow.stage import exit_on_sigterm, load_project

    params, paths = load_project(params_path, family)
    chosen = params.family(family)
    options: Any = {"engine": engine, "port": port, "draft": draft, "num_speculative_tokens": num_speculative_tokens}
    if print_only:
        click.echo(launch_for(chosen, family, paths, **options))
        return
    exit_on_sigterm()
    serve_until_stopped(chosen, family, paths, **options, say=click.echo)


@cli.command()
@click.argument("family")
@click.option(
    "--budget-s",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds of measuring, once the models are loaded.",
)
@click.option(
    "--max-nodes", type=click.IntRange(1, 127), default=63, show_default=True, help="Most tokens drafted at a time."
)
@click.option(
    "--prompts",
    "num_prompts",
    type=click.IntRange(min=2),
    default=12,
    show_default=True,
    help="Held-out prompts to search on; at most twice as many fresh ones confirm.",
)
@click.option("--write", is_flag=True, help="Write the recommendation to serve.speculative of params.yaml.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of tune.json and tune.html (default: .specflow/FAMILY/tune).",
)
@params_option
def tune(family: str, params_path: Path, **options: Any) -> None:
    """Search the drafting setting of FAMILY that is fastest on this machine, and confirm it on fresh prompts."""
    from specflow.stage import configure_logging, exit_on_sigterm, load_project, quieten_transformers

    params, paths = load_project(params_path, family)
    chosen = params.family(family)
    configure_logging()
    exit_on_sigterm()
    from specflow.tune.command import Options, run

    quieten_transformers()
    run(family, chosen, params, paths, params_path, Options(**options), click.echo)


@cli.command("bench-served")
@click.argument("family")
@click.option("--engine", type=click.Choice(["vllm", "sglang", "openai"]), help="Default: bench.serve's, else vllm.")
@click.option("--baseline-url", help="A running server of the target alone.")
@click.option("--draft-url", help="A running server with the exported draft.")
@click.option("--concurrency", "-c", type=click.IntRange(min=1), multiple=True, help="Requests at once; repeatable.")
@click.option("--num-prompts", type=click.IntRange(min=1), help="Questions per prompt set.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Per answer (default: bench.max_new_tokens).")
@click.option("--num-speculative-tokens", "-k", type=click.IntRange(min=1), help="Drafted tokens a step.")
@params_option
def bench_served(family: str, params_path: Path, **options: Any) -> None:
    """Measure FAMILY through servers with and without its draft, and print a table; changes no artifact."""
    from specflow.bench.served.command import look
    from specflow.stage import exit_on_sigterm, load_project

    params, paths = load_project(params_path, family)
    exit_on_sigterm()
    for line in look(family, params, paths, options):
        click.echo(line)


@cli.command()
@params_option
def doctor(params_path: Path) -> None:
    """Say which engines work on this machine, with versions, and what is missing."""
    from specflow.config import load_params
    from specflow.paths import outside
    from specflow.serving.doctor import findings

    params = load_params(params_path)
    serves = {name: family.serve for name, family in params.families.items()}
    for line in findings(outside(params.cache_dir), serves):
        click.echo(line)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: gpus, requests, reason.")
def gpus(as_json: bool) -> None:
    """Print the GPUs of this machine, who holds them, and who waits."""
    from specflow.gpus.status import status, status_text

    if as_json:
        click.echo(json.dumps(status(), indent=2))
    else:
        click.echo(status_text(status()))


@cli.command()
@click.argument("names", nargs=-1, metavar="[FAMILY | RUN | FAMILY@latest | @all | @champion]...")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with figures to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of the table.")
@params_option
def compare(names: tuple[str, ...], html: Path | None, as_json: bool, params_path: Path) -> None:
    """Compare benchmarks: families by their files, pipeline runs by MLflow. Without names: every listed family."""
    from specflow.compare.command import collect, compare_json, compare_text

    entries = collect(params_path, names)
    click.echo(compare_json(entries) if as_json else compare_text(entries))
    if html is not None:
        from specflow.compare.page import write_page

        write_page(entries, html)
        click.echo(f"Page: {html}", err=as_json)


@cli.command()
@click.argument("family")
@click.option("--dry-run", is_flag=True, help="Say what would be decided, and change nothing.")
@params_option
def promote(family: str, dry_run: bool, params_path: Path) -> None:
    """Make the family's draft its champion in the model registry if it is better, pair by pair; say why."""
    from specflow.compare.promote import promote as decide
    from specflow.stage import configure_logging, load_project

    params, paths = load_project(params_path, family)
    params.family(family)
    configure_logging()
    click.echo("\n".join(decide(family, params, paths, dry_run=dry_run).sentences))


@cli.command("mlflow-sync")
@params_option
def mlflow_sync(params_path: Path) -> None:
    """Rebuild MLflow runs that are missing from dvc.lock and the metrics files."""
    from specflow.project import sync_mlflow

    for line in sync_mlflow(params_path):
        click.echo(line)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, what may go well later 75.

    Ctrl-C is 130, SIGTERM 143.
    """
    try:
        cli.main(standalone_mode=False)
    except RetryableError as error:
        _fail(" ".join(str(error).split()), RetryableError.EXIT_CODE)
    except UserError as error:
        _fail(" ".join(str(error).split()))
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def _fail(message: str, code: int = 2) -> None:
    click.echo(f"specflow: {message}", err=True)
    sys.exit(code)
