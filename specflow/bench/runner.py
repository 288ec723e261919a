"""Runs benchmark requests: the same prompts by every engine, paired and in alternating order, one record each.

Every engine answers the same prompts: a later turn's history is the baseline's answer to the same sample (which under
greedy decoding is everyone's). Prompts too long for the context are an error on the first turn and counted on later
ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from specflow.bench.questions import largest_draft, prompt_tokens
from specflow.bench.statistics.metrics import acceptance, speedup, tok_s
from specflow.bench.statistics.records import Record, paired, record_key
from specflow.config_bench import Bench
from specflow.data.prompt_sets import Question
from specflow.decoding.generate import Drafter, Generation, generate
from specflow.decoding.known import KnownAnswerDrafter
from specflow.decoding.sampling import Sampling
from specflow.files import RowLog, sha256_json
from specflow.results.schema import SweepPoint
from specflow.sharding.shares import MERGE, WHOLE, Share
from specflow.targets.cached import CachedTarget
from specflow.targets.template import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Engine:
    """A way to decode: the baseline has no drafter."""

    name: str
    drafter: Drafter | None = None
    num_speculative_tokens: int = 0
    only_repeat: int | None = None
    """A reference row runs in one repeat: in the second where it has to know the baseline's answer."""

    def runs_in(self, repeat: int) -> bool:
        return self.only_repeat in (None, repeat)


@dataclass(frozen=True)
class PromptedTurn:
    """A turn of a question with what was said before it."""

    number: int
    """Of the question, over all sets."""
    set: str
    question: Question
    sample: int
    turn: int
    prompt: list[int]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.set, self.question.question_id, self.sample, self.turn


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
        self.target, self.tokenizer, self.bench, self.log, self.max_length = target, tokenizer, bench, log, max_length
        self.eos_ids = frozenset(eos_ids)
        self.num_skipped_turns = 0
        self._answers: dict[tuple[str, str, int, int], list[int]] = {}

    def warm_up(self, engines: Sequence[Engine], question: Question) -> None:
        """One short request by each engine; its records are dropped."""
        prompt = prompt_tokens(self.tokenizer, [{"role": "user", "content": question.turns[0]}])
        for engine in engines:
            self._generate(engine, prompt, min(WARM_UP_TOKENS, self.bench.max_new_tokens), 0, [])

    def run(
        self,
        sets: Mapping[str, Sequence[Question]],
        engines: Sequence[Engine],
        repeats: int,
        *,
        desc: str,
        share: Share = WHOLE,
        bar_stays: bool = True,
    ) -> list[Record]:
        """Records of every request of `share`, engine and repeat. Later turns take the first engine's first answer as
        history, which is the baseline's where it runs.

        The order of the engines is reversed from request to request and from repeat to repeat, in the same way in
        however many shares.
        """
        records: list[Record] = []
        runs = sum(engine.runs_in(repeat) for repeat in range(repeats) for engine in engines)
        turns = sum(min(len(q.turns), self.bench.max_turns) for _, _, q in _owned(sets, share))
        with tqdm(total=runs * turns * self.bench.num_samples, desc=desc, unit="request", leave=bar_stays) as bar:
            for repeat in range(repeats):
                active = [engine for engine in engines if engine.runs_in(repeat)]
                for request in self._requests(sets, repeat, share):
                    turned = (request.number + request.turn + request.sample + repeat) % 2
                    for order, engine in enumerate(active[::-1] if turned else active):
                        record = self._record(engine, request, repeat, order)
                        records.append(record)
                        if engine is engines[0] and repeat == 0:
                            self._answers[request.key] = record.token_ids
                        bar.update()
        return records

    def requests(self, sets: Mapping[str, Sequence[Question]]) -> list[PromptedTurn]:
        """Every request that `run` made of these sets, of the first sample."""
        return [request for request in self._requests(sets, 1, WHOLE) if request.sample == 0]

    def _requests(self, sets: Mapping[str, Sequence[Question]], repeat: int, share: Share) -> Iterator[PromptedTurn]:
        """Requests in order; a turn is rendered after its predecessor was answered."""
        for number, name, question in _owned(sets, share):
            for sample in range(self.bench.num_samples):
                messages: list[Message] = []
                for turn, text in enumerate(question.turns[: self.bench.max_turns]):
                    messages.append({"role": "user", "content": text})
                    prompt = prompt_tokens(self.tokenizer, messages)
                    left = self.max_length - len(prompt) - self.bench.max_new_tokens
                    if turn > 0 and left < largest_draft(self.bench):
                        self.num_skipped_turns += repeat == 0
                        break
                    request = PromptedTurn(number, name, question, sample, turn, prompt)
                    yield request
                    answer = self.tokenizer.decode(self._answers[request.key], skip_special_tokens=True)
                    messages.append({"role": "assistant", "content": str(answer)})

    def _record(self, engine: Engine, request: PromptedTurn, repeat: int, order: int) -> Record:
        question = request.question
        key = record_key(request.set, question.question_id, request.turn, request.sample, repeat, engine.name)
        if key in self.log.rows:
            return Record.from_json(self.log.rows[key])
        if self.target is None:
            MERGE.check_nothing_left("bench", 1)
        seed = int(sha256_json([self.bench.seed, *request.key, repeat])[:12], 16)
        answer = self._answers.get(request.key, [])
        started_at = time.time()
        done = self._generate(engine, request.prompt, self.bench.max_new_tokens, seed, answer)
        record = Record(
            set=request.set,
            question_id=question.question_id,
            category=question.category,
            turn=request.turn,
            repeat=repeat,
            engine=engine.name,
            order=order,
            num_prompt_tokens=len(request.prompt),
            token_ids=done.token_ids,
            steps=[list(step) for step in done.steps],
            num_cut=done.num_cut,
            prefill_s=done.prefill_s,
            draft_s=done.draft_s,
            verify_s=done.verify_s,
            decode_s=done.decode_s,
            finish_reason=done.finish_reason,
            sample=request.sample,
            started_at=started_at,
            model_s=done.model_s,
        )
        self.log.append(record.to_json())
        return record

    def _generate(
        self, engine: Engine, prompt: list[int], max_new_tokens: int, seed: int, answer: Sequence[int]
    ) -> Generation:
        """`answer`: the baseline's, for the drafters that are told it."""
        assert self.target is not None, "only a runner with a target measures"
        if isinstance(engine.drafter, KnownAnswerDrafter):
            engine.drafter.expect(answer)
        return generate(
            self.target,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            drafter=engine.drafter,
            num_speculative_tokens=engine.num_speculative_tokens,
            sampling=sampling_of(self.bench),
            generator=torch.Generator(device=self.target.device).manual_seed(seed),
        )


def sampling_of(bench: Bench) -> Sampling:
    return Sampling(bench.temperature, bench.top_p, bench.top_k)


def _owned(sets: Mapping[str, Sequence[Question]], share: Share) -> Iterator[tuple[int, str, Question]]:
    """Questions of a share as (number over all sets, set, question)."""
    everything = [(name, question) for name, questions in sets.items() for question in questions]
    for number, (name, question) in enumerate(everything):
        if share.owns(number):
            yield number, name, question


def sweep(runner: Runner, drafter: Drafter, questions: Sequence[Question], counts: Sequence[int]) -> list[SweepPoint]:
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
            SweepPoint(
                num_speculative_tokens=engine.num_speculative_tokens,
                acceptance_length=acceptance(own, engine.num_speculative_tokens).length,
                tok_s=tok_s(own),
                speedup=speedup(paired(baseline, own)),
            )
        )
    return rows
