"""The tuner's hands: a family's target and exported draft, measured by the code that the benchmark runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specflow.bench.costs import measure_costs
from specflow.bench.job import family_job
from specflow.bench.questions import largest_draft, load_questions, prompt_tokens, spread
from specflow.bench.runner import Engine, Runner, sampling_of
from specflow.bench.statistics.drift import machine_load
from specflow.bench.statistics.records import BASELINE, Record
from specflow.config import Family, Params
from specflow.config_bench import HELDOUT, Bench, DynamicTree
from specflow.data.prompt_sets import Question
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import check_fits, clock_of, generate
from specflow.decoding.sampling import Sampling
from specflow.decoding.tree import TreeDrafter
from specflow.decoding.verify import NOTHING, Proposal
from specflow.device import default_device
from specflow.drafters.inference import decoding_dtype, place
from specflow.errors import UserError
from specflow.export.eagle3 import check_export, load_export
from specflow.files import RowLog
from specflow.paths import Paths
from specflow.results.schema import Conditions, StepCosts
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.model import load_model, load_tokenizer, read_facts
from specflow.tune.acceptance import Walkable, path_ranks
from specflow.tune.candidates import Candidate, largest_total
from specflow.tune.cut import by_frequency, cut_draft
from specflow.tune.search import widths

VERIFIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of a verification that are timed, as far as the candidates go."""


class ModelBench:
    """See `search.Workbench`. Loads the models when it is made; `close` lets go of them."""

    def __init__(self, name: str, family: Family, params: Params, paths: Paths, max_nodes: int) -> None:
        """Raises UserError where the family has no export, or no held-out prompts are left to tune on."""
        facts, self._folder = read_facts(paths.target), paths.export / "eagle3"
        check_export(self._folder, facts)
        self._draft, self._paths = load_export(self._folder), paths
        self._tokenizer = load_tokenizer(facts, paths.cache)
        self._eos_ids = facts.eos_token_ids
        largest = DynamicTree(total_token=max_nodes + 1, depth=1, top_k=1)
        self.bench: Bench = family.bench.model_copy(update={"tree": largest, "max_turns": 1, "num_samples": 1})
        self.pool = self._questions(name, family, params, facts.max_position_embeddings)
        self.max_new_tokens, self.greedy = self.bench.max_new_tokens, self.bench.greedy
        self.draft_vocab_size = self._draft.config.draft_vocab_size
        self.conditions = Conditions(busy_share=machine_load()["busy_share"])
        self.device = default_device()
        model = optimise_for_inference(load_model(facts, paths.cache, device=str(self.device)))
        self._decoding_dtype = decoding_dtype(self.bench.draft_dtype, model.dtype, self.device)
        self._embedding: Tensor = model.get_input_embeddings().weight
        prompts = [len(self._prompt(question)) for question in self.pool]
        # behind an answer there is room for the widest tree, and for what the answer's end is compared with
        length = min(facts.max_position_embeddings, max(prompts) + self.max_new_tokens + 2 * max_nodes)
        self._context = int(statistics.median(prompts)) + self.max_new_tokens // 2
        self._target = CachedTarget(
            model, num_rows=1, max_length=length, aux_layer_ids=self._draft.config.aux_layer_ids
        )
        self.clock = clock_of(self.device)
        self._max_nodes = max_nodes
        self._sessions: dict[int | None, Eagle3Session] = {}
        self._engines: dict[str, Engine] = {}
        self._log = RowLog(paths.state / "tune.jsonl", key=f"{time.time()}")
        self._runner = Runner(self._target, self._tokenizer, self._eos_ids, self.bench, self._log, length)
        self._costs: StepCosts | None = None

    def close(self) -> None:
        self._log.close(delete=True)
        self._target.close()

    def _questions(self, name: str, family: Family, params: Params, context: int) -> list[Question]:
        """First turns of held-out conversations that the benchmark does not ask, those first that its sweep uses."""
        named = [HELDOUT] if HELDOUT in family.bench.prompt_sets else []
        bench = family.bench.model_copy(update={"prompt_sets": named, "assistant": None})
        job = family_job(name, family.model_copy(update={"bench": bench}), params, self._paths)
        sets, tuning = load_questions(job)
        asked = {question.question_id for question in sets.get(HELDOUT, [])}
        everything = bench.model_copy(update={"prompt_sets": [HELDOUT], "num_prompts": 10**9, "tree": self.bench.tree})
        job = job.model_copy(update={"bench": everything, "heldout": self._paths.prompts / "eval.jsonl"})
        rest = [q for q in load_questions(job)[0][HELDOUT] if q.question_id not in asked]
        known = {question.question_id for question in tuning}
        rest.sort(key=lambda question: question.question_id not in known)
        pool = [Question(q.question_id, q.category, q.turns[:1]) for q in rest]
        fitting = [question for question in pool if self._fits(question, context)]
        if len(fitting) < 4:
            raise UserError(
                f"{len(fitting)} held-out prompts are left beside the benchmark's own, tuning needs 4: raise "
                f"families.{name}.data.eval_conversations, or lower bench.num_prompts"
            )
        return fitting

    def _fits(self, question: Question, context: int) -> bool:
        try:
            check_fits(len(self._prompt(question)), self.bench.max_new_tokens, 2 * largest_draft(self.bench), context)
        except UserError:
            return False
        return True

    def _prompt(self, question: Question) -> list[int]:
        return prompt_tokens(self._tokenizer, [{"role": "user", "content": question.turns[0]}])

    def split(self, num_prompts: int) -> tuple[list[Question], list[Question]]:
        """Questions to search on, and fresh ones: at most `num_prompts` and twice as many, no question among both."""
        searched = self.pool[: min(num_prompts, len(self.pool) // 2)]
        return searched, spread(self.pool[len(searched) :], 2 * num_prompts)

    def can_cut(self) -> bool:
        return (self._paths.samples / "train.jsonl").exists()

    def _session(self, size: int | None) -> Eagle3Session:
        if size not in self._sessions:
            draft = load_export(self._folder)  # its own copy: a session packs the weights anew
            if size is not None:
                always = [*self._tokenizer.all_special_ids, *self._eos_ids]
                draft = cut_draft(draft, by_frequency(draft, self._paths.samples / "train.jsonl", always)[:size])
            draft = place(draft, self._decoding_dtype, self.device)
            self._sessions[size] = Eagle3Session(draft, self._embedding, self._target.max_length)
        return self._sessions[size]

    def costs(self, draft_vocab_size: int | None, limit_s: float) -> StepCosts:
        whole = draft_vocab_size is None
        tokens = [n for n in VERIFIED if n <= self._max_nodes + 1] if whole else [1]
        measured = measure_costs(
            self._target,
            self._session(draft_vocab_size),
            tokens,
            self._context,
            top_ks=widths(draft_vocab_size or self.draft_vocab_size),
            limit_s=limit_s,
        )
        if whole:
            self._costs = measured
        assert self._costs is not None, "the whole head is measured first"
        return measured.changed(target_ms=self._costs.target_ms, verify_ms=self._costs.verify_ms)

    def answer(
        self, question: Question, depths: Mapping[int, int], draft_vocab_size: int | None
    ) -> dict[int, Walkable]:
        session, prompt = self._session(draft_vocab_size), self._prompt(question)
        watching = _Watching(session, dict(depths), sampling_of(self.bench))
        done = generate(
            self._target,
            prompt,
            max_new_tokens=self.max_new_tokens + max(depths.values()),  # drafts reach beyond the end of an answer
            eos_ids=frozenset(self._eos_ids),
            drafter=watching,
            sampling=sampling_of(self.bench),
            generator=torch.Generator(device=self.device).manual_seed(self.bench.seed),
        )
        num_tokens = min(len(done.token_ids), self.max_new_tokens)
        walkable = {}
        for top_k, depth in depths.items():
            grown = watching.grown[top_k][: num_tokens - 1]
            ranks = [path_ranks(*tree, done.token_ids[t + 1 :], depth) for t, tree in enumerate(grown)]
            walkable[top_k] = Walkable(num_tokens, np.array(ranks, dtype=np.int64).reshape(-1, depth, depth))
        return walkable

    def measure(self, candidates: Sequence[Candidate], questions: Sequence[Question], phase: str) -> list[Record]:
        engines = [self._engine(None), *(self._engine(candidate) for candidate in candidates)]
        return self._runner.run({phase: questions}, engines, 1, desc=f"tune: {phase}", bar_stays=False)

    def _engine(self, candidate: Candidate | None) -> Engine:
        """The engine of a candidate, or of the target alone; warmed up when it is first asked for."""
        name = BASELINE if candidate is None else candidate.name
        if name not in self._engines:
            engine = Engine(BASELINE)
            if candidate is not None:
                session = self._session(candidate.draft_vocab_size)
                tree = DynamicTree(total_token=candidate.total_token, depth=candidate.depth, top_k=candidate.top_k)
                drafter = ChainDrafter(session) if candidate.is_chain else TreeDrafter(session, tree)
                engine = Engine(name, drafter, candidate.depth)
            self._runner.warm_up([engine], self.pool[0])
            self._engines[name] = engine
        return self._engines[name]


@dataclass
class _Watching:
    """Proposes nothing, so that the target decodes plainly, and grows the trees that it could have proposed."""

    session: Eagle3Session
    depths: dict[int, int]
    sampling: Sampling
    grown: dict[int, list[tuple[list[int], list[int], list[float]]]] = field(default_factory=dict)
    """By top_k and step: tokens, parents and scores of every candidate node."""

    def __post_init__(self) -> None:
        self._drafters = {
            top_k: TreeDrafter(
                self.session, DynamicTree(total_token=largest_total(depth, top_k), depth=depth, top_k=top_k)
            )
            for top_k, depth in self.depths.items()
        }
        self.grown = {top_k: [] for top_k in self.depths}

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self.session.start(history, aux)

    def max_nodes(self, num_tokens: int) -> int:
        return 0

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        before = self.session.verified
        for top_k, drafter in self._drafters.items():
            self.session.verified = before  # each ingests the same rows
            self.grown[top_k].append(drafter.candidates(history, aux, self.sampling))
        return NOTHING
