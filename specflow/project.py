"""The project as a whole: making a folder ready, the short table of results, the MLflow record's repair."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from specflow.config import load_params
from specflow.config_bench import StaticTree
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.results.schema import ReferenceRow, SetResult, Summary, family_summary
from specflow.stage import configure_logging, family_paths, listed_families

DVC_SETTINGS = {"core.analytics": "false", "core.check_update": "false", "core.autostage": "false"}


def init_project(root: Path, params_path: Path) -> list[str]:
    """Set up DVC, the MLflow store and its experiments in `root`; say what is there. Idempotent."""
    params = load_params(params_path)
    configure_logging()
    if not any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents)):
        raise UserError(f"{root.resolve()} is not in a git repository: run `git init` first, DVC needs it")
    dvc = shutil.which("dvc")
    if dvc is None:
        raise UserError("no `dvc` on the PATH: activate the environment that specflow is installed in")
    if not (root / ".dvc").is_dir():
        below = [] if (root / ".git").exists() else ["--subdir"]  # of the repository: DVC's own root is the project
        _run([dvc, "init", *below], root)
    config = (root / ".dvc" / "config").read_text(encoding="utf-8")
    for key, value in DVC_SETTINGS.items():
        if f"{key.partition('.')[2]} = {value}" not in config:
            _run([dvc, "config", key, value], root)
    from specflow.tracking import store

    client = store.open_store(root)
    names = listed_families(params)
    for name in names:
        store.ensure_experiment(client, name, root)
    return [
        f"DVC: {root / '.dvc'}",
        f"MLflow: {store.describe(root)}, experiments {', '.join(names) or 'none yet'}",
        *_prefect_objects(root),
        "Next: dvc repro",
    ]


def _prefect_objects(root: Path) -> list[str]:
    """Work pool and GPU limit where a Prefect server answers, by a process of its own: only flows/ imports prefect."""
    if not (root / "flows" / "setup.py").exists():
        return []
    command = [sys.executable, "-m", "flows.setup"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return ["Prefect: the server did not answer within 30 s; run `specflow init` again"]
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return [f"Prefect: {said[-1] if said else f'python -m flows.setup exited with {done.returncode}'}"]


def _run(command: list[str], root: Path) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"`{' '.join(command)}` failed: {said or f'exit code {done.returncode}'}")


def sync_mlflow(params_path: Path) -> list[str]:
    """Rebuild missing MLflow runs of every listed family; one line per family."""
    from specflow.tracking import record

    params = load_params(params_path)
    configure_logging()
    lines = []
    for name in listed_families(params):
        rebuilt = record.sync(name, params, family_paths(name, params))
        lines.append(f"{name}: rebuilt {', '.join(rebuilt)}" if rebuilt else f"{name}: nothing missing")
    return lines


def results_text(params_path: Path) -> str:
    """The benchmark of every listed family as a short table, and where the report is."""
    params = load_params(params_path)
    blocks = []
    for name in listed_families(params):
        paths = family_paths(name, params)
        if (paths.bench / "summary.json").exists():
            blocks.append(family_table(name, family_summary(paths)))
    if not blocks:
        raise UserError("no results yet: run `dvc repro` first")
    report = Paths(root=Path(), family="", cache=Path()).report / "report.html"
    where = [f"Report: {report}"] if report.exists() else ["Report: run `dvc repro report`"]
    from specflow.tracking.store import where_to_look

    return "\n\n".join([*blocks, "\n".join([*where, f"Runs:   {where_to_look(Path())}"])])


REFERENCE_ROWS = {
    "lookup": "n-gram lookup",
    "assistant": "assistant model",
    "oracle": "always right",
    "null": "always wrong",
}


def family_table(name: str, summary: Summary) -> str:
    """The benchmark of one family, from its summary.json, as text in columns."""
    from specflow.compare.command import table

    header = ["prompt set", "acceptance", "survival by position", "tok/s", "without", "speedup [95 % CI]", "lossless"]
    rows = []
    for set_name, result in summary.sets.items():
        rows.append([set_name, *_cells(result, " ".join(f"{rate:.2f}" for rate in result.survival))])
        references = result.references
        rows += [[f"  {what}", *_cells(references[k], "")] for k, what in REFERENCE_ROWS.items() if k in references]
    return "\n".join([f"{name}, {drafting(summary)}", table(header, rows), summary.verdict])


def drafting(summary: Summary) -> str:
    """How many tokens a step drafts, in words."""
    depth, tree = summary.num_speculative_tokens, summary.tree
    if tree is None:
        return f"{depth} drafted tokens a step"
    kind = "static" if isinstance(tree, StaticTree) else "dynamic"
    return f"a {kind} tree of at most {tree.total_token - 1} nodes, {depth} deep"


def _cells(result: SetResult | ReferenceRow, survival: str) -> list[str]:
    """What a prompt set or a reference row has below the header; `-` for what was not measured."""
    speedup, interval = _number(result.speedup, "{:.2f}x"), result.speedup_ci
    return [
        _number(result.acceptance_length, "{:.2f}"),
        survival,
        _number(result.tok_s, "{:.1f}"),
        _number(result.baseline_tok_s, "{:.1f}"),
        speedup if interval is None else f"{speedup} [{interval[0]:.2f}, {interval[1]:.2f}]",
        {True: "yes", False: "NO", None: "sampled"}[result.lossless],
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
