"""The load contract, proven: what specflow exports serves in vLLM exactly as specflow's own chain decodes it.

Two servers of a tiny target: the plain form with a pruned vocabulary, and speculators' form with every norm variant,
four aux layers and the whole vocabulary. Drafts have learned the questions in part, so that acceptance is neither none
nor all.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from specflow.config import parse_params
from specflow.data import vocab
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import Generation, generate
from specflow.drafters.eagle3 import Eagle3Draft, load_draft
from specflow.export import stage as export
from specflow.export.speculators import save_speculators
from specflow.extract import stage as extract
from specflow.sample import stage as sampling
from specflow.serving.engines import find_install, launch
from specflow.serving.family import child_server
from specflow.serving.server import Endpoint, free_port, running
from specflow.targets.cached import CachedTarget
from specflow.targets.model import load_model
from specflow.training import stage as training
from tests.captures import TinyProject, tiny_project, write_split
from tests.unit.export.test_imports import make_draft

K = 3
MAX_NEW_TOKENS = 24
AUX = [1, 2, 4, 6]
QUESTIONS = ["the cat sees one bird", "every river moves slowly", "some old window", "a red letter and a number", "dog"]
SECTIONS = {
    "data": {"train_conversations": 5, "eval_conversations": 5, "max_prompt_tokens": 100},
    "sample": {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 4},
    "vocab": {"draft_vocab_size": 200},
    "extract": {"dtype": "float32", "max_length_tokens": 200, "batch_tokens": 400},
    "train": {"ttt_steps": K, "epochs": 60, "batch_tokens": 400, "lr": 5e-3, "warmup_ratio": 0.1, "evals": 2},
    "export": {"num_speculative_tokens": K},
}


def trained(folder: Path, target: Path, venv: str, **changes: dict[str, Any]) -> TinyProject:
    """A tiny family whose draft knows its training answers in part; one prompt set for everything."""
    made = tiny_project(folder, target)
    family = made.settings["families"]["tiny"]
    for section, values in SECTIONS.items():
        family[section] = family.get(section, {}) | values | changes.get(section, {})
    family["serve"] = {"venv": venv}
    made.params = parse_params(made.settings)
    rows = [
        {"id": f"q{i}", "source": "s", "category": "c", "messages": [{"role": "user", "content": question}]}
        for i, question in enumerate(QUESTIONS)
    ]
    write_split(made.paths.prompts, rows, [row | {"id": f"e{row['id']}"} for row in rows])
    for stage in (sampling, vocab, extract, SimpleNamespace(run=training.run_offline), export):
        made.run(stage)
    return made


def prompts(project: TinyProject) -> list[list[int]]:
    """Prompt tokens of the questions, and some that training has not seen (their second halves)."""
    lines = (project.paths.samples / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    seen = [row["token_ids"][: row["spans"][0][0]] for row in rows]
    return [*seen, *(row["token_ids"][: row["spans"][0][0] + 9] for row in rows)]


def in_process(project: TinyProject, draft: Eagle3Draft | None) -> list[Generation]:
    model = load_model(project.facts, project.paths.cache)
    target = CachedTarget(model, num_rows=1, max_length=200, aux_layer_ids=draft.config.aux_layer_ids if draft else ())
    drafter = None if draft is None else ChainDrafter(Eagle3Session(draft, model.get_input_embeddings().weight, 200))
    done = [
        generate(
            target,
            prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_ids=frozenset(project.facts.eos_token_ids),
            drafter=drafter,
            num_speculative_tokens=K if drafter else 0,
        )
        for prompt in prompts(project)
    ]
    target.close()
    return done


def served(endpoint: Endpoint, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Answer and accepted drafts by step."""
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": MAX_NEW_TOKENS, "temperature": 0.0}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    answer.raise_for_status()
    done: dict[str, Any] = answer.json()
    return done["choices"][0]["token_ids"], done["metrics"]["speculative_decoding"]["per_step_accepted"]


def check(project: TinyProject, endpoint: Endpoint, draft: Eagle3Draft) -> float:
    """Answers equal the target's own, acceptance equals our chain's step by step; the acceptance length."""
    alone, chained = in_process(project, None), in_process(project, draft)
    accepted: list[int] = []
    for prompt, plain, chain in zip(prompts(project), alone, chained, strict=True):
        token_ids, steps = served(endpoint, prompt)
        assert token_ids == plain.token_ids == chain.token_ids
        assert steps == [kept for _, kept in chain.steps]
        accepted += steps
    return 1 + sum(accepted) / len(accepted)


def test_a_served_draft_is_lossless_and_accepted_as_in_process(
    tmp_path: Path, tiny_target: Path, vllm_venv: str
) -> None:
    project = trained(tmp_path / "project", tiny_target, vllm_venv)
    with child_server(project.family, "tiny", project.paths, engine="vllm", draft=True) as server:
        length = check(project, server.endpoint, load_draft(project.paths.draft))
    assert 1.3 < length < K + 0.9


def test_speculators_form_with_every_variant_serves_alone(tmp_path: Path, tiny_target: Path, vllm_venv: str) -> None:
    """`vllm serve <draft>`: target, K, four aux layers, all norms and the whole vocabulary come from one folder.

    The draft began as somebody else's (random, in speculators' form) and was fine-tuned, so reading, training and
    writing every variant must agree with vLLM.
    """
    facts = tiny_project(tmp_path / "other", tiny_target).facts
    variant = make_draft(
        facts, draft_vocab_size=facts.vocab_size, head_dim=64, num_attention_heads=2, num_key_value_heads=1,
        aux_layer_ids=AUX, norm_before_residual=True, norm_before_fc=True, norm_output=True,
    )  # fmt: skip
    save_speculators(variant, facts, tmp_path / "theirs", verifier="org/name", num_speculative_tokens=K)
    project = trained(
        tmp_path / "project",
        tiny_target,
        vllm_venv,
        vocab={"draft_vocab_size": facts.vocab_size},
        extract={"aux_layer_ids": AUX},
        train={"init_from": str(tmp_path / "theirs")},
        export={"speculators": True},
    )
    install, port = find_install("vllm", project.family.serve, project.paths.cache), free_port()
    folder = project.paths.export / "speculators"
    # launch asks for acceptance by request where it is given a draft; here the draft is in the one folder
    serve = project.family.serve.model_copy(update={"extra_args": ["--per-request-spec-decode-metrics", "detailed"]})
    alone = launch(install, serve, target=folder, target_dtype="float32", served_name="tiny", port=port)
    with running(alone, port=port, model="tiny", log=tmp_path / "server.log", start_timeout_s=300) as server:
        length = check(project, server.endpoint, load_draft(project.paths.draft))
    assert 1.3 < length < K + 0.9
