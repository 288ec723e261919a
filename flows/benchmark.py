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
    name: str | None = None,
) -> Any:
    """Run the bench stage alone, once for each number of drafted tokens; what is left out stays as in params.yaml.

    Args:
        family: The family whose exported draft is measured.
        num_speculative_tokens: Values of K to measure one after the other; `auto` picks K on held-out prompts.
        prompt_sets: Names of prompt_sets, or heldout.
        num_prompts: Questions per set.
        repeats: Passes over every prompt, at least 3.
        max_new_tokens: Tokens per turn.
        temperature: 0 is greedy.
        name: Prefix of the experiments' names; default the family and the time.
    """
    fixed = {
        "bench.prompt_sets": prompt_sets,
        "bench.num_prompts": num_prompts,
        "bench.repeats": repeats,
        "bench.max_new_tokens": max_new_tokens,
        "bench.temperature": temperature,
    }
    setting = {key: value for key, value in fixed.items() if value is not None}
    settings = [{"bench.num_speculative_tokens": k, **setting} for k in num_speculative_tokens or []] or [setting]
    return run_points(family, settings, target="bench", single=True, name=name)
