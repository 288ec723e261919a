"""Runs benchmark requests: the same prompts by every engine, paired and in alternating order, one record each.

Every engine answers the same prompts: a later turn's history is the baseline's first answer (which under greedy
decoding is everyone's). Prompts too long for the context are an error on the first turn and counted on later ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from specflow.bench.metrics import Record, acceptance, paired, speedup, tok_s
from specflow.config import Bench
from specflow.data.prompt_sets import Question
from specflow.data.template import Message, encode, render
from specflow.decoding.generate import Drafter, check_fits, generate
from specflow.errors import UserError
from specflow.files import RowLog, sha256_json
from specflow.shares import MERGE, WHOLE, Share
from specflow.targets.cached import CachedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARM_UP_TOKENS = 16
STOCK_PROMPTS = 3
_HISTORY_SLACK = 1.25  # answers are tokenised anew as history and may come out longer
_LEAST_CACHE_TOKENS = 2048  # room that costs nothing until it is written


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, taken evenly over the sequence so that no category is left out by its place."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    return encode(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def cache_length(
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Question]],
    bench: Bench,
    num_speculative_tokens: int,
    context: int,
) -> int:
    """Cache size in tokens that holds every question with all its turns, at most the model's `context`.

    Raises UserError naming a question whose first turn does not fit.
    """
    needed = 0
    for name, questions in sets.items():
        for question in questions:
            first = len(prompt_tokens(tokenizer, [{"role": "user", "content": question.turns[0]}]))
            try:
                check_fits(first, bench.max_new_tokens, num_speculative_tokens, context)
            except UserError as error:
                raise UserError(f"prompt set {name}, question {question.question_id}: {error}") from None
            turns = question.turns[: bench.max_turns]
            messages: list[Message] = []
            for turn in turns:
                messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "."}]
            history = len(prompt_tokens(tokenizer, messages[:-1]))
            needed = max(needed, history + int(len(turns) * bench.max_new_tokens * _HISTORY_SLACK))
    return min(context, max(needed + num_speculative_tokens, _LEAST_CACHE_TOKENS))


@dataclass(frozen=True)
class Engine:
    """A way to decode: the baseline has no drafter."""

    name: str
    drafter: Drafter | None = None
    num_speculative_tokens: int = 0
    max_repeats: int | None = None
    """A reference row need not run in every repeat."""


class Runner:
    """Runs engines over questions; `log` holds finished records across a kill, and those of other shares."""

    def __init__(
        self,
        target: CachedTarget | None,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        bench: Bench,
        log: RowLog,
        max_length: int,
    ) -> None:
        """Without a `target` every record must be in the log; `max_length` tokens fit the target's cache."""
        self.target, self.tokenizer, self.eos_ids, self.bench, self.log, self.max_length = (
            target,
            tokenizer,
            frozenset(eos_ids),
            bench,
            log,
            max_length,
        )
        self.num_skipped_turns = 0
        self._answers: dict[tuple[str, str, int], str] = {}

    def warm_up(self, engines: Sequence[Engine], question: Question) -> None:
        """One short request by each engine; its records are dropped."""
        prompt = prompt_tokens(self.tokenizer, [{"role": "user", "content": question.turns[0]}])
        for engine in engines:
            self._generate(engine, prompt, min(WARM_UP_TOKENS, self.bench.max_new_tokens), 0)

    def run(
        self,
        sets: Mapping[str, Sequence[Question]],
        engines: Sequence[Engine],
        repeats: int,
        *,
        desc: str,
        share: Share = WHOLE,
    ) -> list[Record]:
        """Records of every request of `share`, engine and repeat. The order of the engines is reversed from request to
        request and from repeat to repeat, in the same way in however many shares."""
        assert engines[0].drafter is None, "the baseline comes first: later turns take its answers as history"
        records: list[Record] = []
        total = sum(
            min(repeats, engine.max_repeats or repeats) * min(len(question.turns), self.bench.max_turns)
            for engine in engines
            for _, _, question in _owned(sets, share)
        )
        with tqdm(total=total, desc=desc, unit="request") as bar:
            for repeat in range(repeats):
                active = [engine for engine in engines if engine.max_repeats is None or repeat < engine.max_repeats]
                for number, name, question, turn, prompt in self._requests(sets, repeat, share):
                    ordered = active if (number + turn + repeat) % 2 == 0 else active[::-1]
                    for order, engine in enumerate(ordered):
                        record = self._record(engine, name, question, turn, repeat, order, prompt)
                        records.append(record)
                        if engine is engines[0] and repeat == 0:
                            text = self.tokenizer.decode(record.token_ids, skip_special_tokens=True)
                            self._answers[name, question.question_id, turn] = text
                        bar.update()
        return records

    def requests(self, sets: Mapping[str, Sequence[Question]]) -> list[tuple[str, Question, int, list[int]]]:
        """(set, question, turn, prompt) of every request that `run` made of these sets."""
        return [(name, question, turn, prompt) for _, name, question, turn, prompt in self._requests(sets, 1, WHOLE)]

    def _requests(
        self, sets: Mapping[str, Sequence[Question]], repeat: int, share: Share
    ) -> Iterator[tuple[int, str, Question, int, list[int]]]:
        """Requests in order, each with its question's number; a turn is rendered after its predecessor was answered."""
        for number, name, question in _owned(sets, share):
            messages: list[Message] = []
            for turn, text in enumerate(question.turns[: self.bench.max_turns]):
                messages.append({"role": "user", "content": text})
                prompt = prompt_tokens(self.tokenizer, messages)
                k = self.max_length - len(prompt) - self.bench.max_new_tokens
                if turn > 0 and k < self._largest_k():
                    self.num_skipped_turns += repeat == 0
                    break
                yield number, name, question, turn, prompt
                messages.append({"role": "assistant", "content": self._answers[name, question.question_id, turn]})

    def _largest_k(self) -> int:
        fixed = self.bench.num_speculative_tokens
        return max(self.bench.sweep) if fixed == "auto" else fixed

    def _record(
        self, engine: Engine, name: str, question: Question, turn: int, repeat: int, order: int, prompt: list[int]
    ) -> Record:
        key = f"{name}/{question.question_id}/{turn}/{repeat}/{engine.name}"
        if key in self.log.rows:
            return Record.from_json(self.log.rows[key])
        if self.target is None:
            MERGE.check_nothing_left("bench", 1)
        seed = int(sha256_json([self.bench.seed, name, question.question_id, turn, repeat])[:12], 16)
        done = self._generate(engine, prompt, self.bench.max_new_tokens, seed)
        record = Record(
            set=name,
            question_id=question.question_id,
            category=question.category,
            turn=turn,
            repeat=repeat,
            engine=engine.name,
            order=order,
            num_prompt_tokens=len(prompt),
            token_ids=done.token_ids,
            steps=[list(step) for step in done.steps],
            num_cut=done.num_cut,
            prefill_s=done.prefill_s,
            draft_s=done.draft_s,
            verify_s=done.verify_s,
            decode_s=done.decode_s,
            finish_reason=done.finish_reason,
        )
        self.log.append(record.to_json())
        return record

    def _generate(self, engine: Engine, prompt: list[int], max_new_tokens: int, seed: int) -> Any:
        assert self.target is not None, "only a runner with a target measures"
        return generate(
            self.target,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            drafter=engine.drafter,
            num_speculative_tokens=engine.num_speculative_tokens,
            temperature=self.bench.temperature,
            generator=torch.Generator(device=self.target.device).manual_seed(seed),
        )


def _owned(sets: Mapping[str, Sequence[Question]], share: Share) -> Iterator[tuple[int, str, Question]]:
    """Questions of a share as (number over all sets, set, question)."""
    everything = [(name, question) for name, questions in sets.items() for question in questions]
    for number, (name, question) in enumerate(everything):
        if share.owns(number):
            yield number, name, question


def sweep(
    runner: Runner, drafter: Drafter, questions: Sequence[Question], counts: Sequence[int]
) -> list[dict[str, float]]:
    """Speed at each number of speculative tokens, over the first turns of `questions`."""
    first_turns = [Question(q.question_id, q.category, q.turns[:1]) for q in questions]
    engines = [Engine("baseline"), *(Engine(f"draft-{k}", drafter, k) for k in counts)]
    runner.warm_up(engines, first_turns[0])
    records = runner.run({"sweep": first_turns}, engines, 1, desc="bench: sweep over K")
    baseline = [record for record in records if record.engine == "baseline"]
    rows = []
    for engine in engines[1:]:
        own = [record for record in records if record.engine == engine.name]
        rows.append(
            {
                "num_speculative_tokens": engine.num_speculative_tokens,
                "acceptance_length": acceptance(own, engine.num_speculative_tokens).length,
                "tok_s": tok_s(own),
                "speedup": speedup(paired(baseline, own)),
            }
        )
    return rows


def time_stock_generate(
    model: PreTrainedModel, prompts: Mapping[str, list[int]], eos_ids: Sequence[int], bench: Bench
) -> dict[str, Any]:
    """Time transformers' own generate() on prompts by request key. Returns {"tok_s", "answers": {key: token ids}}."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": bench.temperature, "top_k": 0, "top_p": 1.0}
    # a fresh configuration: the checkpoint's own may carry penalties that our engine has no part in
    config = GenerationConfig(
        eos_token_id=sorted(eos_ids),
        pad_token_id=min(eos_ids),
        **(sampling if bench.temperature > 0 else {"do_sample": False}),
    )
    model.generation_config = config

    def run(prompt: list[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
        return out[0, len(prompt) :].tolist()

    run(next(iter(prompts.values())), min(WARM_UP_TOKENS, bench.max_new_tokens))
    answers, seconds = {}, 0.0
    for key, prompt in tqdm(prompts.items(), desc="bench: stock generate()", unit="request"):
        start = time.perf_counter()
        answers[key] = run(prompt, bench.max_new_tokens)
        seconds += time.perf_counter() - start
    return {"tok_s": sum(map(len, answers.values())) / seconds, "answers": answers}
