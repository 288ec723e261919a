"""The questions of a benchmark: which ones of each prompt set, which tune K, and whether they fit the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specflow import files
from specflow.bench.job import Job
from specflow.config_bench import HELDOUT, Bench
from specflow.data.prompt_sets import Question, read_prompt_set
from specflow.decoding.generate import check_fits
from specflow.errors import UserError
from specflow.targets.template import Message, encode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sets = dict[str, list[Question]]
_HISTORY_SLACK = 1.25  # answers are tokenised anew as history and may come out longer
_LEAST_CACHE_TOKENS = 2048  # room that costs nothing until it is written


def largest_depth(bench: Bench) -> int:
    """Most tokens on a drafted path, of all that the benchmark tries."""
    if bench.tree is not None:
        return bench.tree.depth
    return max(bench.sweep) if bench.num_speculative_tokens == "auto" else bench.num_speculative_tokens


def largest_draft(bench: Bench) -> int:
    """Most tokens drafted at once, of all that the benchmark tries: what prompts and caches leave room for."""
    tree = bench.tree
    return largest_depth(bench) if tree is None else max(tree.total_token - 1, tree.depth)


def load_questions(job: Job) -> tuple[Sets, list[Question]]:
    """Questions of each prompt set, and those held-out ones on which K is tuned: no question is among both."""
    bench = job.bench
    heldout: list[Question] = []
    if job.heldout is not None:
        rows = files.read_jsonl(job.heldout, what="held-out prompts", made_by="specflow prepare <family>")
        heldout = [_heldout_question(row) for row in rows]
    tuning: list[Question] = []
    if bench.sweeps and job.has_draft:
        reserved = len(heldout) // 2 if HELDOUT in bench.prompt_sets else len(heldout)
        tuning = spread(heldout, min(bench.sweep_prompts, reserved)) if reserved else []
        if not tuning:
            raise UserError(
                f"{job.heldout} has {len(heldout)} prompts, too few to choose num_speculative_tokens on: "
                "raise data.eval_conversations or set bench.num_speculative_tokens to a number"
            )
    taken = {question.question_id for question in tuning}
    sets: Sets = {}
    for name in bench.prompt_sets:
        if name == HELDOUT:
            questions = [question for question in heldout if question.question_id not in taken]
        else:
            questions = read_prompt_set(name, job.prompts[name])
        if not questions:
            raise UserError(f"prompt set {name} has no questions: raise data.eval_conversations or leave the set out")
        sets[name] = _chosen(name, questions, job)
    return sets, tuning


def _chosen(name: str, questions: Sequence[Question], job: Job) -> list[Question]:
    if job.questions is None:
        return spread(questions, job.bench.num_prompts)
    begin, end = job.questions
    if not (chosen := list(questions[begin:end])):
        asked = f"from {begin} on" if end is None else f"from {begin} up to {end}"
        raise UserError(
            f"prompt set {name} has {len(questions)} questions, none {asked}: questions are counted from 0 by their "
            "place in the file"
        )
    return chosen


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, taken evenly over the sequence so that no category is left out by its place."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _heldout_question(row: Mapping[str, Any]) -> Question:
    """The user turns of a held-out conversation."""
    turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return Question(row["id"], row["category"], turns)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    return encode(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def cache_length(
    tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[Question]], bench: Bench, context: int
) -> int:
    """Cache size in tokens that holds every question with all its turns, at most the model's `context`.

    Raises UserError for a tree that does not fit, and naming a question whose first turn does not.
    """
    if bench.tree is not None and bench.tree.total_token + bench.max_new_tokens >= context:
        raise UserError(
            f"a tree of {bench.tree.total_token} tokens and {bench.max_new_tokens} new ones leave no room for a prompt "
            f"in the target's context of {context}: lower tree.total_token"
        )
    needed = 0
    for name, questions in sets.items():
        for question in questions:
            first = len(prompt_tokens(tokenizer, [{"role": "user", "content": question.turns[0]}]))
            try:
                check_fits(first, bench.max_new_tokens, largest_draft(bench), context)
            except UserError as error:
                raise UserError(f"prompt set {name}, question {question.question_id}: {error}") from None
            turns = question.turns[: bench.max_turns]
            messages: list[Message] = []
            for turn in turns:
                messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "."}]
            history = len(prompt_tokens(tokenizer, messages[:-1]))
            needed = max(needed, history + int(len(turns) * bench.max_new_tokens * _HISTORY_SLACK))
    return min(context, max(needed + largest_draft(bench), _LEAST_CACHE_TOKENS))
