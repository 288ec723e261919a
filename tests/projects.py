"""A whole specflow project in a scratch folder, driven as a user drives it: by commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT
from tests.toys import make_project_inputs


class Project:
    """A project folder and the commands a user types in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def repro(self) -> list[str]:
        """Stages that `dvc repro` ran, in order; without `inputs`, which always runs."""
        ran = re.findall(r"Running stage '([^']+)'", self.run("dvc", "repro"))
        return [address for address in ran if not address.startswith("inputs@")]

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text(encoding="utf-8"))

    def set(self, *keys: str, value: object) -> None:
        file = self.folder / "params.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = raw
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")


def make_project(folder: Path, params: dict[str, Any]) -> Project:
    """specflow's code and dvc.yaml with `params`, in git, after `specflow init`; the tiny target's inputs beside."""
    for name in ("specflow", "flows"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "prefect.yaml", ".gitignore", ".dvcignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    make_project_inputs(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    made = Project(folder)
    made.run("git", "init", "--quiet")
    made.run("specflow", "init")
    return made
