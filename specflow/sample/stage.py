"""Stage `sample`: prompts become training samples, answered by the target itself or by the data set.

Owns the rows, their files and resume; generation is the engine's. The seam to an engine is `generation.complete`: given
conversations, yield completed ones by id in any order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from tqdm import tqdm

from specflow.device import default_device
from specflow.errors import UserError
from specflow.files import RowLog, read_jsonl, sha256_file, write_jsonl
from specflow.resume import State, code_digest, versions
from specflow.sample import generation, served
from specflow.sample.dialogue import Conversation, Turns
from specflow.sharding.shares import WHOLE, Share, open_log, open_state
from specflow.targets import template
from specflow.targets.model import TargetFacts, load_model, load_tokenizer, read_facts

if TYPE_CHECKING:
    from specflow.config import Family, Params, Sample
    from specflow.paths import Log, Paths
    from specflow.targets.template import Message


SPLITS = ("train", "eval")


def run(name: str, family: Family, params: Params, paths: Paths, log: Log, share: Share = WHOLE) -> dict[str, float]:
    """Write samples/{train,eval}.jsonl in the order of the prompts; what a killed run or shares finished is kept."""
    with closing(_Work.open(name, family, paths, share)) as work:
        resumed = sum(len(log.rows) for log in work.logs.values())
        share.check_nothing_left("sample", len(work.split_of) - resumed)
        tok_s = work.answer(family, share)
        rows = {split: _in_order(work.prompts[split], work.logs[split]) for split in SPLITS}
        metrics = {**_metrics(rows), "refused_conversations": _total(work, "refused"), "resumed_conversations": resumed}
        for split in SPLITS:
            write_jsonl(paths.samples / f"{split}.jsonl", rows[split])
        work.state.finish()
    if family.sample.keep_states:
        metrics |= {count: _total(work, count) for count in ("rows_with_states", "recomputed_tokens")}
    return {**metrics, "tok_s": tok_s}


def run_share(name: str, family: Family, params: Params, paths: Paths, share: Share) -> dict[str, float]:
    """Answer the conversations of one share and leave them in its own logs; returns its speed."""
    with closing(_Work.open(name, family, paths, share)) as work:
        return {"tok_s": work.answer(family, share)}


@dataclass
class _Work:
    """Inputs of the stage and what of it is done."""

    name: str
    facts: TargetFacts
    tokenizer: Any
    paths: Paths
    prompts: dict[str, list[Any]]
    split_of: dict[str, str]
    limit: int
    state: State
    logs: dict[str, RowLog]
    """By split: what this process appends to, and all that is finished."""

    @classmethod
    def open(cls, name: str, family: Family, paths: Paths, share: Share) -> _Work:
        facts = read_facts(paths.target)
        tokenizer = load_tokenizer(facts, paths.cache)
        made_by = f"dvc repro prepare@{name}"
        files = {split: paths.prompts / f"{split}.jsonl" for split in SPLITS}
        prompts = {split: read_jsonl(file, what="prompts", made_by=made_by) for split, file in files.items()}
        split_of = _split_of(prompts, made_by)
        limit = min(family.extract.max_length_tokens, facts.max_position_embeddings)
        prompts_digests = {split: sha256_file(file) for split, file in files.items()}
        state = open_state(paths.state / "sample", f"sample@{name}", _key(facts, family, paths, prompts_digests), share)
        try:
            logs = {split: open_log(state.folder, f"sample-{split}", state.key, share) for split in SPLITS}
        except BaseException:
            state.close()
            raise
        return cls(name, facts, tokenizer, paths, prompts, split_of, limit, state, logs)

    def close(self) -> None:
        for log in self.logs.values():
            log.close()
        self.state.close()

    def answer(self, family: Family, share: Share) -> float:
        """Complete the conversations of `share` that no log has; returns generated tokens per second, 0 without any."""
        everything = [(split, row) for split in SPLITS for row in self.prompts[split]]
        own = [(split, row) for number, (split, row) in enumerate(everything) if share.owns(number)]
        missing = [(split, row) for split, row in own if row["id"] not in self.logs[split].rows]
        started, generated = time.perf_counter(), 0
        with tqdm(total=len(own), initial=len(own) - len(missing), desc="sample", unit="conversation") as progress:
            for done in self._complete(family, missing, "sample" if share.count <= 1 else f"sample-{share.name}"):
                self.logs[self.split_of[done["id"]]].append(done)
                generated += sum(_num_generated(row) for row in done["rows"])
                progress.set_postfix_str(f"{generated / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                progress.update()
        return generated / (time.perf_counter() - started) if generated else 0.0

    def _complete(self, family: Family, missing: list[tuple[str, Any]], log_name: str) -> Iterator[dict[str, Any]]:
        """{"id", "rows"} of every missing (split, conversation), both splits in one batch so that there is one tail."""
        settings, facts = family.sample, self.facts
        if not missing:
            return
        if settings.engine == "dataset":
            completed = (_from_dataset(self.tokenizer, row, settings.seed) for _, row in missing)
        else:
            conversations = [_conversation(row, settings, split) for split, row in missing]
            turns = Turns(
                self.tokenizer,
                facts.eos_token_ids,
                max_new_tokens=settings.max_new_tokens,
                max_length_tokens=self.limit,
                keep_thinking=settings.keep_thinking,
            )
            if settings.engine in served.ENGINES:
                yield from served.complete(
                    conversations,
                    family=family,
                    name=self.name,
                    paths=self.paths,
                    facts=facts,
                    turns=turns,
                    log_name=log_name,
                )
                return
            completed = generation.complete(
                conversations,
                model=load_model(facts, self.paths.cache, device=str(default_device())),
                turns=turns,
                batch_size=settings.batch_size,
            )
        engine = _engine_name(settings)
        for done in completed:
            yield {"id": done["id"], "rows": [{**row, "engine": engine} for row in done["rows"]]}


def _split_of(prompts: dict[str, list[Any]], made_by: str) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for split, rows in prompts.items():
        for row in rows:
            if row["id"] in split_of:
                raise UserError(
                    f"prompts hold id {row['id']} twice, ids must be unique over both splits: run `{made_by}`"
                )
            split_of[row["id"]] = split
    return split_of


def _key(facts: TargetFacts, family: Family, paths: Paths, prompts_digests: dict[str, str]) -> dict[str, Any]:
    """What the rows depend on. How many run side by side is left out: a row does not depend on others."""
    settings = family.sample
    served_by = served.identity(family, paths) if settings.engine in served.ENGINES else {}
    return {
        "code": code_digest(paths.root, "sample"),
        "versions": versions() | {"served_by": served_by.pop("version", None)},
        "target": facts.identity,
        "inputs": prompts_digests,
        "settings": settings.model_dump(mode="json", exclude={"batch_size", "concurrency"})
        | {"max_length_tokens": family.extract.max_length_tokens, "serve": served_by},
    }


def _engine_name(settings: Sample) -> str:
    return f"transformers {transformers.__version__}" if settings.engine == "transformers" else settings.engine


def _conversation(row: dict[str, Any], settings: Sample, split: str) -> Conversation:
    digest = hashlib.sha256(f"{settings.seed}:{row['id']}".encode()).digest()
    temperature = settings.eval_temperature
    if split == "train":
        temperature = settings.temperatures[int.from_bytes(digest[:8], "big") % len(settings.temperatures)]
    return Conversation(row["id"], row["category"], row["messages"], temperature, settings.seed)


def _from_dataset(tokenizer: Any, row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The data set's own answers as a sample row; none where it has no answer."""
    messages = list(row["messages"])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return {"id": row["id"], "rows": []}
    rows = [
        {
            "id": f"{row['id']}#{number}" if number else row["id"],
            "category": row["category"],
            "token_ids": token_ids,
            "spans": spans,
            "turns": [{"text": message["content"], "finish_reason": "stop"} for message in answers],
            "temperature": 0.0,
            "seed": seed,
        }
        for number, (answers, token_ids, spans) in enumerate(_sequences(tokenizer, messages))
    ]
    return {"id": row["id"], "rows": rows}


def _sequences(tokenizer: Any, messages: list[Message]) -> list[tuple[list[Message], list[int], list[list[int]]]]:
    """(answers, token ids, spans): one for all answers, or one for each where the template rewrites history.

    A template that drops old thoughts shows an answer whole only while it is the last one.
    """
    token_ids, spans = template.encode_conversation(tokenizer, messages)
    ends = [
        i + 1 for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    alone = [template.encode_conversation(tokenizer, messages[:end]) for end in ends]
    last = [(ids, own[-1]) for ids, own in alone]
    if all(token_ids[start:end] == ids[own[0] : own[1]] for (start, end), (ids, own) in zip(spans, last, strict=True)):
        return [([messages[end - 1] for end in ends], token_ids, spans)]
    return [([messages[end - 1]], ids, [own]) for end, (ids, own) in zip(ends, last, strict=True)]


def _in_order(prompts: list[Any], log: RowLog) -> list[dict[str, Any]]:
    return [row for prompt in prompts for row in log.rows[prompt["id"]]["rows"]]


def _total(work: _Work, count: str) -> int:
    """Of what an engine counted by conversation."""
    return sum(done.get(count, 0) for log in work.logs.values() for done in log.rows.values())


def _num_generated(row: dict[str, Any]) -> int:
    return sum(end - start for start, end in row["spans"])


def _metrics(rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    everything = [row for split in SPLITS for row in rows[split]]
    generated = sum(_num_generated(row) for row in everything)
    turns = [turn for row in everything for turn in row["turns"]]
    if not everything:
        raise UserError("sample: no conversation has an answer: check data.sources, or use sample.engine: transformers")
    retokenised = [turn["round_trip"] for turn in turns if "round_trip" in turn]
    return {
        "rows": len(everything),
        "train_rows": len(rows["train"]),
        "eval_rows": len(rows["eval"]),
        "turns": len(turns),
        "generated_tokens": generated,
        "train_generated_tokens": sum(map(_num_generated, rows["train"])),
        "prompt_tokens": sum(len(row["token_ids"]) for row in everything) - generated,
        "finished_by_length": sum(turn["finish_reason"] == "length" for turn in turns),
        "retokenised_turns": len(retokenised),
        "round_trip_differs": retokenised.count("differs"),
    }
