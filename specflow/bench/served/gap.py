"""Train-to-serve gap: the acceptance that training promised, that the in-process engine has, and that a server has.

The served acceptance length over what training expected is the one number; beside it the served over the in-process
one, which answered the same prompts with the same K and tells on which side of the export the loss lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from specflow import http
from specflow.bench.served.client import Request
from specflow.errors import UserError
from specflow.export.eagle3 import check_export
from specflow.files import read_json
from specflow.results.served import Check, Gap
from specflow.serving.server import Endpoint
from specflow.targets.model import TargetFacts

APART = 0.05
"""Relative difference above which the report says where to look."""


def expected_length(metrics_file: Path, num_speculative_tokens: int) -> float | None:
    """Acceptance length that training expected for K drafted tokens; None where it was not trained that far."""
    if not metrics_file.exists():
        return None
    trained = read_json(metrics_file, what="training metrics", made_by="specflow train_offline <family>")
    rates = [trained.get(f"survival_{i}") for i in range(1, num_speculative_tokens + 1)]
    return None if None in rates else 1.0 + sum(rates)


def gap(
    where: str,
    num_requests: int,
    *,
    expected: float | None,
    in_process: float,
    served: float,
    interval: tuple[float, float] | None,
    checks: Sequence[Check],
) -> Gap:
    """The three acceptance lengths, how far they lie apart, and where to look where that is above 5 %."""
    of_server = served / in_process - 1.0
    of_training = None if expected is None else served / expected - 1.0
    number = of_server if of_training is None else of_training
    return Gap(
        set=where,
        num_requests=num_requests,
        expected=expected,
        in_process=in_process,
        served=served,
        served_interval=interval,
        gap=number,
        gap_to_in_process=of_server,
        apart=max(abs(number), abs(of_server)) > APART,
        advice=_advice(expected, of_training, of_server, interval, checks),
        checks=list(checks),
    )


def _advice(
    expected: float | None,
    of_training: float | None,
    of_server: float,
    interval: tuple[float, float] | None,
    checks: Sequence[Check],
) -> list[str]:
    """Where to look, the likeliest first; empty where nothing is apart."""
    advice = []
    if abs(of_server) > APART:
        advice.append(f"The server accepts {of_server:+.1%} against the in-process chain on the same prompts.")
        failed = [check for check in checks if check.ok is False]
        advice += [f"Look at the {check.what}: {check.found}." for check in failed]
        unknown = ", ".join(check.what for check in checks if check.ok is None)
        if unknown:
            advice.append(f"The server does not tell its {unknown}: compare by hand.")
        if not failed:
            advice.append(
                "Every check that can be made from outside holds. What is left is how the engine reads the draft: "
                "RoPE, layer ids and norm flags of config.json, which engines default differently, and its version."
            )
    if of_training is not None and abs(of_training) > APART and expected is not None:
        if abs(of_server) <= APART:
            text = (
                f"Server and in-process chain agree; both lie {of_training:+.1%} from what training expected. Look at "
                "the prompts: training starts chains at every position of all held-out answers, a server only where a "
                "step ends"
            )
            if interval is None:
                text += ", and so few prompts tell little of others"
            elif interval[0] <= expected <= interval[1]:
                low, high = interval
                text += f", and with this few prompts the interval {low:.2f} to {high:.2f} holds the expected value"
            advice.append(f"{text}.")
        else:
            advice.append(f"Training expected {expected:.2f}: {of_training:+.1%}.")
    return advice


def check_contract(folder: Path, facts: TargetFacts) -> Check:
    """The export against its load contract and the target: tensors, RoPE, context, layer ids, norm flags."""
    try:
        check_export(folder, facts)
    except UserError as error:
        return Check("export", False, str(error))
    config = read_json(folder / "config.json", what="export config", made_by="specflow export <family>")
    flags = ", ".join(f"{key} {config[key]}" for key in ("norm_before_residual", "norm_before_fc", "norm_output"))
    ids = config["eagle_aux_hidden_state_layer_ids"]
    return Check("export", True, f"keeps its load contract: RoPE and context of the target, layer ids {ids}, {flags}")


def check_template(endpoint: Endpoint, request: Request, facts: TargetFacts, timeout_s: float) -> Check:
    """The server's own chat template on a question's first turn, against the prompt that was rendered here."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": request.text}],
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
    }
    if facts.template_options:
        body["chat_template_kwargs"] = facts.template_options
    try:
        url = f"{endpoint.url}/v1/chat/completions"
        answer = http.post(url, json=body, headers=endpoint.headers, timeout=timeout_s)
        told = answer.raise_for_status().json()
        ids, count = told.get("prompt_token_ids"), told["usage"]["prompt_tokens"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Check("chat template", None, f"/v1/chat/completions does not answer: {type(error).__name__}")
    if ids is not None:
        place = next((i for i, (a, b) in enumerate(zip(request.prompt, ids, strict=False)) if a != b), None)
        if ids == request.prompt:
            return Check("chat template", True, f"renders the same {len(ids)} tokens as target.json's, digest checked")
        where = f"from token {place} on" if place is not None else f"{len(ids)} tokens, {len(request.prompt)} here"
        return Check("chat template", False, f"the server renders a question otherwise ({where})")
    same = count == len(request.prompt)
    return Check("chat template", same, f"renders a question to {count} tokens, here {len(request.prompt)}")


def check_prompts(counts: Sequence[tuple[int, int | None]]) -> Check:
    """Prompt lengths as sent and as the server counts them: a second start token shows here."""
    told = [(sent, counted) for sent, counted in counts if counted is not None]
    if not told:
        return Check("prompt length", None, "no usage in the answers")
    other = [(sent, counted) for sent, counted in told if sent != counted]
    if not other:
        return Check("prompt length", True, f"all {len(told)} prompts have the same number of tokens on both sides")
    sent, counted = other[0]
    return Check(
        "prompt length", False, f"{len(other)} of {len(told)} differ, such as {sent} sent and {counted} counted"
    )


def check_dtype(server: str | None, target: str) -> Check:
    if server is None:
        return Check("dtype", None, f"target.json has {target}")
    return Check("dtype", server == target, f"the server runs in {server}, in process the target ran in {target}")


def check_k(server: int | None, num_speculative_tokens: int) -> Check:
    if server is None:
        return Check("K", None, f"the benchmark drafts {num_speculative_tokens}")
    return Check("K", server == num_speculative_tokens, f"server {server}, in process {num_speculative_tokens}")


def check_outputs(same: int, total: int) -> Check:
    """Greedy answers of the served target alone against the in-process ones."""
    if not total:
        return Check("target's output", None, "no token ids, or sampled")
    return Check("target's output", same == total, f"{same} of {total} greedy answers are the in-process ones")
