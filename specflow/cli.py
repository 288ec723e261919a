"""The `specflow` command: one subcommand per DVC stage, and a few for the project. Imports nothing heavy at the top."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from specflow import __version__
from specflow.errors import UserError

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
    _add_stage(_stage, _summary)


@cli.command()
@params_option
@parent_option
def report(params_path: Path, parent_run_id: str | None) -> None:
    """Write report/report.html and report.md over all families."""
    from specflow.stage import exit_on_sigterm, run_report

    exit_on_sigterm()
    run_report(params_path, parent_run_id=parent_run_id)


@cli.command()
@params_option
def results(params_path: Path) -> None:
    """Print the short table of what was measured, and where the report is."""
    from specflow.project import results_text

    click.echo(results_text(params_path))


@cli.command("mlflow-sync")
@params_option
def mlflow_sync(params_path: Path) -> None:
    """Rebuild MLflow runs that are missing from dvc.lock and the metrics files."""
    from specflow.project import sync_mlflow

    for line in sync_mlflow(params_path):
        click.echo(line)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2; Ctrl-C is 130, SIGTERM 143."""
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        _fail(" ".join(str(error).split()))
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def _fail(message: str) -> None:
    click.echo(f"specflow: {message}", err=True)
    sys.exit(2)
