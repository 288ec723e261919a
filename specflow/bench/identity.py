"""What a benchmark was run on and with: the block without which its numbers mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

import specflow
from specflow.device import name_of
from specflow.errors import UserError
from specflow.files import sha256_file
from specflow.results.schema import Identity, TargetIdentity, Versions
from specflow.resume import code_digest
from specflow.targets.model import TargetFacts


def identity(facts: TargetFacts, draft_folder: Path | None, root: Path, device: torch.device) -> Identity:
    """Machine, versions, digests and commit."""
    return Identity(
        cpu=cpu_model(),
        cpu_cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        load_average_at_start=os.getloadavg()[0],
        device=name_of(device),
        platform=platform.platform(),
        versions=Versions(
            specflow=specflow.__version__,
            engine=code_digest(root, "bench"),  # speeds measured by other code are other measurements
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        ),
        target=TargetIdentity(
            source=facts.source,
            revision=facts.revision,
            digest=facts.digest,
            tokenizer_digest=facts.tokenizer_digest,
            template_digest=facts.template_digest,
            dtype=facts.dtype,
        ),
        draft_digest=None if draft_folder is None else draft_digest(draft_folder),
        git_commit=git_commit(root),
    )


def draft_digest(folder: Path) -> str:
    """sha256 of the draft's weights: ours, or the pickled ones of a foreign draft."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return sha256_file(folder / name)
    raise UserError(f"{folder} has no draft (model.safetensors): run `specflow export <family>`, or name its folder")


def cpu_model() -> str:
    """Model name of the processor; Linux names it in a file, elsewhere Python's own word has to do."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit(root: Path) -> str | None:
    """Commit of the project folder, `+changes` behind it where tracked files differ; None outside a repository."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
