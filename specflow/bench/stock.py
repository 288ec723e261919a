"""transformers' own generate() with the model as it loads: the reference row that shows our baseline is no slow one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from specflow.bench.questions import Sets, prompt_tokens
from specflow.bench.runner import WARM_UP_TOKENS
from specflow.bench.statistics import metrics
from specflow.bench.statistics.records import BASELINE, Record
from specflow.config_bench import Bench

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_PROMPTS = 3


@dataclass(frozen=True)
class OverStock:
    """Stock generate() and what the target alone makes of it, as summary.json has them."""

    tok_s: float | None = None
    ratio: float | None = None
    same: bool | None = None


def stock_prompts(sets: Sets, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """First turns of some questions, by `set/question_id`."""
    questions = [(name, question) for name, questions in sets.items() for question in questions]
    chosen = questions[:: max(1, len(questions) // NUM_PROMPTS)][:NUM_PROMPTS]
    return {
        f"{name}/{question.question_id}": prompt_tokens(tokenizer, [{"role": "user", "content": question.turns[0]}])
        for name, question in chosen
    }


def time_stock_generate(
    model: PreTrainedModel, prompts: Mapping[str, list[int]], eos_ids: Sequence[int], bench: Bench
) -> dict[str, Any]:
    """Time generate() on prompts by request key. Returns {"tok_s", "answers": {key: token ids}}."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": bench.temperature, "top_k": bench.top_k, "top_p": bench.top_p}
    # a fresh configuration: the checkpoint's own may carry penalties that our engine has no part in
    config = GenerationConfig(
        eos_token_id=sorted(eos_ids),
        pad_token_id=min(eos_ids),
        **({"do_sample": False} if bench.greedy else sampling),
    )
    model.generation_config = config

    def run(prompt: list[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
        return out[0, len(prompt) :].tolist()  # .tolist() waits for the device

    run(next(iter(prompts.values())), min(WARM_UP_TOKENS, bench.max_new_tokens))
    answers, seconds = {}, 0.0
    for key, prompt in tqdm(prompts.items(), desc="bench: stock generate()", unit="request"):
        start = time.perf_counter()
        answers[key] = run(prompt, bench.max_new_tokens)
        seconds += time.perf_counter() - start
    return {"tok_s": sum(map(len, answers.values())) / seconds, "answers": answers}


def over_stock(records: Sequence[Record], stock: Mapping[str, Any] | None, *, greedy: bool) -> OverStock:
    """The baseline against stock generate(), on the requests that stock answered; None where either did not run."""
    if stock is None:
        return OverStock()
    answers = stock["answers"]
    own = [
        record
        for record in records
        if record.engine == BASELINE
        and record.turn == record.sample == 0
        and f"{record.set}/{record.question_id}" in answers
    ]
    if not own:
        return OverStock(stock["tok_s"])
    same = all(record.token_ids == answers[f"{record.set}/{record.question_id}"] for record in own)
    return OverStock(stock["tok_s"], metrics.tok_s(own) / stock["tok_s"], same if greedy else None)
