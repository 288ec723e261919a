"""Capture throughput against the bare forward on the same batches: `python benchmarks/capture.py --family smollm2`.

Both run the same optimised decoder without its head; the capture also packs, converts, digests and writes its states.
Alternated in one process; prints tokens per second and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from specflow.config import load_params
from specflow.extract.stage import SampleRow, capture, plan_batches, plan_shards
from specflow.hidden_states import RowInfo, bytes_per_token
from specflow.stage import family_paths
from specflow.targets.attention import optimise_for_inference
from specflow.targets.model import decoder_of, load_model, read_facts, resolve_aux_layer_ids


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    params = load_params(Path("params.yaml"))
    paths, settings = family_paths(arguments.family, params), params.family(arguments.family).extract
    facts = read_facts(paths.target)
    layers = resolve_aux_layer_ids(facts, settings)
    model = optimise_for_inference(load_model(facts, paths.cache))
    decoder = decoder_of(model)

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(120, 300, (arguments.rows,), generator=generator).tolist()
    tokens = {f"r{i}": torch.randint(10, 40000, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}
    rows = [
        SampleRow(RowInfo(id=key, split="train", category="x", shard=0, offset=0, length=len(ids), spans=[(1, 9)]), ids)
        for key, ids in tokens.items()
    ]
    token_bytes = bytes_per_token(facts.hidden_size, len(layers), settings.dtype)
    shards = plan_shards(rows, settings.shard_bytes // token_bytes, "benchmark")
    total = sum(lengths)

    @torch.inference_mode()
    def bare() -> None:
        for shard in shards:
            for batch in plan_batches(shard.rows, settings.batch_tokens):
                padded = torch.zeros(len(batch), batch[0].length, dtype=torch.int64)
                for i, row in enumerate(batch):
                    padded[i, : row.length] = torch.tensor(tokens[row.id])
                decoder(input_ids=padded, use_cache=False)

    def captured() -> None:
        with tempfile.TemporaryDirectory() as folder:
            capture(model, shards, tokens, Path(folder), settings, layers)

    bare()
    captured()
    pairs = [(seconds(captured), seconds(bare)) for _ in range(arguments.pairs)]
    ratios = [plain / whole for whole, plain in pairs]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {total} tokens")
    for (whole, plain), ratio in zip(pairs, ratios, strict=True):
        print(f"capture {total / whole:.0f} tok/s, bare forward {total / plain:.0f} tok/s: {ratio:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
