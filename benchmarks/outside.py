"""Share of decoding that lies in no model call, for every way to draft and to sample: the table of docs/decoding.md.

    python benchmarks/outside.py [project folder] --num-prompts 4 --rounds 5

The project must have been run: it names the target, the prompts and the exported draft. The ways alternate from round
to round; medians over the rounds are printed, with the lowest and the highest: a share of a millisecond is easily
disturbed.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from decoding import load_prompts, project_parser

from specflow.bench.identity import cpu_model, git_commit
from specflow.config import load_params
from specflow.config_bench import DynamicTree, StaticTree
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Drafter, Generation, generate
from specflow.decoding.sampling import Sampling
from specflow.decoding.tree import TreeDrafter
from specflow.drafters.inference import decoding_dtype, prepare
from specflow.export.eagle3 import load_export
from specflow.stage import family_paths
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import load_model, read_facts

SAMPLINGS = {
    "greedy": Sampling(),
    "T = 0.8": Sampling(0.8),
    "and top-p 0.9": Sampling(0.8, 0.9),
    "and top-k 50": Sampling(0.8, 1.0, 50),
}
DYNAMIC = {total: DynamicTree(total_token=total, depth=depth, top_k=k) for total, depth, k in
           ((6, 3, 2), (8, 3, 3), (16, 4, 4), (60, 6, 10))}  # fmt: skip
STATIC = {8: [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}
STATIC[16] = [*STATIC[8], [3], [0, 2], [1, 1], [2, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0, 0]]


def ways(session: Eagle3Session, k: int) -> dict[str, tuple[Drafter | None, int]]:
    """Drafter and depth by name."""
    trees: dict[str, DynamicTree | StaticTree] = {f"dynamic tree, {n}": tree for n, tree in DYNAMIC.items()}
    trees |= {f"static tree, {n}": StaticTree(branches=branches) for n, branches in STATIC.items()}
    return {
        "target alone": (None, 0),
        f"chain, K = {k}": (ChainDrafter(session), k),
        **{name: (TreeDrafter(session, tree), tree.depth) for name, tree in trees.items()},
    }


def share(done: list[Generation]) -> tuple[float, float]:
    """Of the decode time outside model calls, and that time in ms a step."""
    total, inside = sum(d.decode_s for d in done), sum(d.model_s for d in done)
    return 1 - inside / total, 1e3 * (total - inside) / sum(len(d.steps) for d in done)


def main() -> None:
    parser = project_parser(__doc__, num_prompts=4, max_new_tokens=48)
    parser.add_argument("--k", type=int, default=3, help="tokens that the chain drafts at a step")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    commit = git_commit(Path(__file__).parents[1])
    os.chdir(arguments.project)
    params = load_params(Path("params.yaml"))
    paths = family_paths(arguments.family, params)
    facts = read_facts(paths.target)
    prompts = load_prompts(params, paths, facts, arguments.num_prompts)
    draft = load_export(paths.export / "eagle3")
    length = max(map(len, prompts)) + arguments.max_new_tokens + 64
    model = optimise_for_inference(load_model(facts, paths.cache))
    target = CachedTarget(model, num_rows=1, max_length=length, aux_layer_ids=draft.config.aux_layer_ids)
    prepared = prepare(draft, decoding_dtype("auto", model.dtype, model.device))
    session = Eagle3Session(prepared, model.get_input_embeddings().weight, length)

    measured: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    drafters = ways(session, arguments.k)
    for number in range(arguments.rounds + 1):
        for name, (drafter, depth) in drafters.items():
            for kind, sampling in SAMPLINGS.items():
                generator = torch.Generator().manual_seed(number)
                done = [
                    generate(
                        target,
                        prompt,
                        max_new_tokens=arguments.max_new_tokens,
                        eos_ids=(),
                        drafter=drafter,
                        num_speculative_tokens=depth,
                        sampling=sampling,
                        generator=generator,
                    )
                    for prompt in prompts
                ]
                if number:  # the first round warms up
                    measured[name, kind].append(share(done))
    print(f"{'':18s}" + "".join(f"{kind:>28s}" for kind in SAMPLINGS))
    for name in drafters:
        cells = [measured[name, kind] for kind in SAMPLINGS]
        print(f"{name:18s}" + "".join(f"{_cell(values):>28s}" for values in cells))
    where = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.platform()}"
    print(f"\n% of the decode time (lowest to highest; ms a step); {where}; commit {commit}")


def _cell(values: list[tuple[float, float]]) -> str:
    shares = [100 * share for share, _ in values]
    return f"{median(shares):.1f} ({min(shares):.1f}-{max(shares):.1f}; {median(ms for _, ms in values):.2f})"


if __name__ == "__main__":
    main()
