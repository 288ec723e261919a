"""An existing draft, measured again under other settings; the workspace and its results stay as they are."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow

from flows.sweep import run_points


@flow(name="benchmark", flow_run_name="benchmark of {family}")
def benchmark(
    family: str,
    num_speculative_tokens: list[int | Literal["auto"]] | None = None,
    prompt_sets: list[str] | None = None,
    num_prompts: int | None = None,
    repeats: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    num_samples: int | None = None,
    batch_sizes: list[int] | None = None,
    trees: list[dict[str, Any]] | None = None,
    assistant: str | None = None,
    accuracy: list[str] | None = None,
    name: str | None = None,
) -> Any:
    """Run the bench stage alone, once for each chain length and each tree; what is left out stays as in params.yaml.

    Args:
        family: The family whose exported draft is measured.
        num_speculative_tokens: Lengths K of a chain to measure one after the other; `auto` picks K on held-out prompts.
        prompt_sets: Names of prompt_sets, or heldout.
        num_prompts: Questions per set.
        repeats: Passes over every prompt, at least 3.
        max_new_tokens: Tokens per turn.
        temperature: 0 is greedy.
        top_p: Sampling from the likeliest tokens up to this probability.
        top_k: Sampling from this many of the likeliest tokens.
        num_samples: Answers to each question, above temperature 0.
        batch_sizes: Requests at once, in process; of chains only.
        trees: Trees to measure one after the other, such as {"total_token": 8, "depth": 3, "top_k": 3}.
        assistant: A whole small model as a reference row.
        accuracy: Prompt sets whose answers are scored.
        name: Prefix of the experiments' names; default the family and the time.
    """
    fixed = {
        "bench.prompt_sets": prompt_sets,
        "bench.num_prompts": num_prompts,
        "bench.repeats": repeats,
        "bench.max_new_tokens": max_new_tokens,
        "bench.temperature": temperature,
        "bench.top_p": top_p,
        "bench.top_k": top_k,
        "bench.num_samples": num_samples,
        "bench.batch_sizes": batch_sizes,
        "bench.assistant": assistant,
        "bench.accuracy": accuracy,
    }
    setting = {key: value for key, value in fixed.items() if value is not None}
    settings: list[dict[str, Any]] = [
        {"bench.num_speculative_tokens": k, "bench.tree": None, **setting} for k in num_speculative_tokens or []
    ]
    settings += [{"bench.tree": tree, **setting} for tree in trees or []]
    return run_points(family, settings or [setting], target="bench", single=True, name=name)
