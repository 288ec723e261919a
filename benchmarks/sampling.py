"""Our client against `vllm bench serve`: the same running server, prompts, answer lengths and concurrency.

    python benchmarks/sampling.py --family smollm2 --concurrency 8

Alternated, after a pass of each that is not counted; prints output tokens per second and the ratio of each pair. Every
answer has exactly --max-new-tokens tokens, as the end token is ignored, and the server keeps no prefixes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from specflow.config import load_params
from specflow.files import read_jsonl, write_json
from specflow.serving.client import Client, Lane, Request, for_each
from specflow.serving.engines import find_install
from specflow.serving.family import child_server
from specflow.serving.server import Endpoint
from specflow.stage import family_paths
from specflow.targets import template
from specflow.targets.model import load_tokenizer, read_facts

BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs; the command itself asks for a distribution named vllm, which the CPU build is not."""


def our_tok_s(endpoint: Endpoint, prompts: list[list[int]], max_new_tokens: int, concurrency: int) -> float:
    """Output tokens per second of all prompts; connections are opened within, as theirs are."""
    generated = 0

    async def main() -> float:
        nonlocal generated
        async with Client([Lane(endpoint)], "vllm", timeout_s=600.0) as client:

            async def ask(prompt: list[int]) -> None:
                nonlocal generated
                done = await client.complete(Request(prompt, max_new_tokens, 0.0, 0, []))
                generated += len(done.token_ids or ())

            started = time.perf_counter()
            await for_each(prompts, ask, concurrency)
            return time.perf_counter() - started

    seconds = asyncio.run(main())
    assert generated == len(prompts) * max_new_tokens
    return generated / seconds


def their_tok_s(
    python: Path, endpoint: Endpoint, tokenizer: Path, dataset: Path, arguments: argparse.Namespace
) -> float:
    result = dataset.with_suffix(".result.json")
    words = {
        "--backend": "openai",
        "--base-url": endpoint.url,
        "--endpoint": "/v1/completions",
        "--model": endpoint.model,
        "--tokenizer": tokenizer,
        "--dataset-name": "sharegpt",
        "--dataset-path": dataset,
        "--sharegpt-output-len": arguments.max_new_tokens,
        "--num-prompts": arguments.num_prompts,
        "--max-concurrency": arguments.concurrency,
        "--temperature": 0,
        "--result-filename": result,
    }
    flags = ["--disable-shuffle", "--ignore-eos", "--save-result", "--disable-tqdm"]
    argv = [str(python), "-c", BENCH, *(str(word) for pair in words.items() for word in pair), *flags]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(result.read_text(encoding="utf-8"))
    assert measured["completed"] == arguments.num_prompts and measured.get("failed", 0) == 0
    assert measured["total_output_tokens"] == arguments.num_prompts * arguments.max_new_tokens
    return float(measured["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="smollm2")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    params = load_params(Path("params.yaml"))
    paths, family = family_paths(arguments.family, params), params.family(arguments.family)
    facts = read_facts(paths.target)
    tokenizer, install = load_tokenizer(facts, paths.cache), find_install("vllm", family.serve, paths.cache)
    rows = itertools.islice(read_jsonl(paths.prompts / "train.jsonl"), arguments.num_prompts)
    texts = [template.render(tokenizer, row["messages"][:1], add_generation_prompt=True) for row in rows]
    prompts = [template.encode(tokenizer, text) for text in texts]
    assert len(prompts) == arguments.num_prompts

    with (
        tempfile.TemporaryDirectory() as folder,
        child_server(
            family,
            arguments.family,
            paths,
            engine="vllm",
            draft=False,
            edit=lambda launch: dataclasses.replace(launch, argv=[*launch.argv, "--no-enable-prefix-caching"]),
        ) as server,
    ):
        dataset = Path(folder) / "prompts.json"
        write_json(dataset, [{"conversations": [{"value": text}, {"value": ""}]} for text in texts])

        def ours() -> float:
            return our_tok_s(server.endpoint, prompts, arguments.max_new_tokens, arguments.concurrency)

        def theirs() -> float:
            return their_tok_s(install.python, server.endpoint, facts.path(paths.cache), dataset, arguments)

        ours(), theirs()
        ratios = []
        for number in range(arguments.pairs):
            order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            tok_s = {measure: measure() for measure in order}
            ratios.append(tok_s[ours] / tok_s[theirs])
            print(f"ours {tok_s[ours]:.1f}, vllm bench serve {tok_s[theirs]:.1f} tokens/s, ratio {ratios[-1]:.3f}")
        print(
            f"median ratio {statistics.median(ratios):.3f}, concurrency {arguments.concurrency}, vllm {install.version}"
        )


if __name__ == "__main__":
    main()
