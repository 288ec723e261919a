"""A project around a tiny target with its prompts or samples written, for the stages between prepare and train."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.config import Family, Params, parse_params
from specflow.files import sha256_json, write_json, write_jsonl
from specflow.paths import Paths
from specflow.targets import fetch
from specflow.targets.model import TargetFacts, read_facts

TINY_PARAMS = {
    "data": {"train_conversations": 9, "eval_conversations": 9},
    "sample": {"max_new_tokens": 12, "batch_size": 3},
    "vocab": {"draft_vocab_size": 64},
    "extract": {"dtype": "float32", "max_length_tokens": 400, "batch_tokens": 128},
}


@dataclass
class TinyProject:
    root: Path
    settings: dict[str, Any]
    params: Params
    paths: Paths

    @property
    def family(self) -> Family:
        return self.params.family("tiny")

    @property
    def facts(self) -> TargetFacts:
        return read_facts(self.paths.target)

    def run(self, stage: Any) -> dict[str, float]:
        return stage.run("tiny", self.family, self.params, self.paths, lambda values, step: None)

    def run_killed(self, module: str, patch: str, timeout_s: float = 120) -> None:
        """Run a stage in a process of its own that `patch` (Python code) kills with SIGKILL on the way."""
        running = self.start_killed(module, patch)
        _, said = running.communicate(timeout=timeout_s)
        assert running.returncode == -9, said

    def start_killed(self, module: str, patch: str) -> subprocess.Popen[str]:
        settings = self.root / f"settings-{sha256_json(self.settings)[:8]}.json"
        write_json(settings, self.settings)
        code = (
            "import os, signal, json, torch; torch.set_num_threads(1)\n"
            "from pathlib import Path; from specflow.config import parse_params; from specflow.paths import Paths\n"
            f"import {module} as stage\n"
            "def kill(): os.kill(os.getpid(), signal.SIGKILL)\n"
            f"{patch}\n"
            f"root = Path({str(self.root)!r})\n"
            f"params = parse_params(json.loads(Path({str(settings)!r}).read_text()))\n"
            "paths = Paths(root, 'tiny', root / 'cache')\n"
            "stage.run('tiny', params.family('tiny'), params, paths, lambda values, step: None)\n"
        )
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def tiny_project(root: Path, target: Path, **sections: dict[str, Any]) -> TinyProject:
    """A project in `root` whose target is the checkpoint folder `target`; `sections` override parts of TINY_PARAMS."""
    family = {
        "target": {"source": f"file:{target}"},
        **{k: {**v, **sections.get(k, {})} for k, v in TINY_PARAMS.items()},
    }
    source = root / "data.json"  # fetch wants it to be there; prompts and samples are written by the tests
    write_json(source, [])
    family["data"]["sources"] = [{"source": f"file:{source}"}]
    family["data"]["max_prompt_tokens"] = family["extract"]["max_length_tokens"] - 1
    settings = {"families": {"tiny": family}}
    project = TinyProject(root, settings, parse_params(settings), Paths(root, "tiny", root / "cache"))
    project.run(fetch)
    return project


def write_split(folder: Path, train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "eval.jsonl", evaluation)
