"""Sampling and capture through vLLM in two passes against one (`sample.keep_states`): seconds, disk, the states.

    python benchmarks/one_pass.py --family smollm2 --num-prompts 48

Needs the family's prompts (`dvc repro prepare@F`). Pairs alternate in order. Each run starts its own servers, as the
stages do: two of them in two passes. Everything is done in a scratch folder.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from specflow.config import Params, load_params
from specflow.extract import stage as extract
from specflow.files import read_jsonl, write_jsonl
from specflow.hidden_states import HiddenStateStore
from specflow.paths import Paths
from specflow.sample import stage as sampling
from specflow.stage import family_paths

EVALUATION_SHARE = 8
"""One held-out conversation for that many training ones."""


class PeakDisk:
    """Largest size of a folder while the block runs, in bytes, looked at five times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes, self._stop = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakDisk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            sizes = 0
            for path in self.folder.rglob("*"):
                try:
                    sizes += path.stat().st_size if path.is_file() else 0
                except OSError:  # moved or deleted meanwhile
                    continue
            self.bytes = max(self.bytes, sizes)


def run(name: str, params: Params, given: Paths, root: Path, num_prompts: int) -> tuple[float, float, HiddenStateStore]:
    """Seconds of both stages, and the store; prints what they measured."""
    paths, family = Paths(root, name, given.cache), params.family(name)
    for split, count in (("train", num_prompts), ("eval", num_prompts // EVALUATION_SHARE + 1)):
        write_jsonl(
            paths.prompts / f"{split}.jsonl", itertools.islice(read_jsonl(given.prompts / f"{split}.jsonl"), count)
        )
    shutil.copy(given.target, paths.target)
    with PeakDisk(paths.state) as peak:
        started = time.perf_counter()
        sampled = sampling.run(name, family, params, paths, lambda values, step: None)
        between = time.perf_counter()
        captured = extract.run(name, family, params, paths, lambda values, step: None)
        ended = time.perf_counter()
    print(
        f"{'one pass  ' if family.sample.keep_states else 'two passes'} sample {between - started:.1f} s, extract "
        f"{ended - between:.1f} s, together {ended - started:.1f} s; {sampled['rows']} rows, "
        f"{captured['captured_tokens']} tokens, {sampled.get('recomputed_tokens', '-')} computed once more, "
        f"{captured['rows_from_sampling']} rows from sampling; disk at most {peak.bytes / 1e6:.0f} MB, store "
        f"{captured['bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    return between - started, ended - between, HiddenStateStore.open(paths.manifest)


def largest_difference(one: HiddenStateStore, other: HiddenStateStore) -> float:
    """Over all rows and streams, of the largest state of that stream in that row. Both have the same rows."""
    largest, width = 0.0, one.manifest.hidden_size
    for row, same in zip(one.rows(), other.rows(), strict=True):
        tokens, *states = one.read(row)
        others, *other_states = other.read(same)
        assert tokens.equal(others), f"row {row.id} has other tokens: answers differ"
        pairs = (torch.cat(both, -1).float().split(width, -1) for both in (states, other_states))
        for a, b in zip(*pairs, strict=True):
            largest = max(largest, float((a - b).abs().max() / b.abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="smollm2")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the store")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    name, params = arguments.family, load_params(Path("params.yaml"))
    ratios = []
    for pair in range(arguments.pairs):
        seconds, stores = {}, {}
        with tempfile.TemporaryDirectory(dir=".") as folder:
            for keep in (False, True) if pair % 2 == 0 else (True, False):
                raw = params.model_dump(mode="json")
                raw["families"][name]["sample"] |= {"engine": "vllm", "keep_states": keep}
                raw["families"][name]["sample"]["concurrency"] = arguments.concurrency
                raw["families"][name]["extract"] |= {"engine": "vllm", "dtype": arguments.dtype}
                changed = Params.model_validate(raw)
                root = Path(folder).resolve() / f"keep-{keep}"
                *parts, stores[keep] = run(name, changed, family_paths(name, params), root, arguments.num_prompts)
                seconds[keep] = sum(parts)
            print(
                f"largest difference {largest_difference(stores[True], stores[False]):.2g} of a stream's largest state"
            )
        ratios.append(seconds[True] / seconds[False])
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"one pass / two passes, in seconds: {listed}; median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
