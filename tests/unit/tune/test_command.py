"""The tuner on a tiny target: what it predicts is what decoding takes, and its command leaves what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from specflow.bench.costs import INGESTED, measure_costs
from specflow.bench.statistics.metrics import acceptance
from specflow.bench.statistics.records import BASELINE
from specflow.cli import cli
from specflow.config import Params, Speculation, parse_params
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.errors import UserError
from specflow.export.eagle3 import load_export, save_export
from specflow.files import write_json, write_jsonl
from specflow.paths import Paths
from specflow.results.schema import StepCosts
from specflow.serving.engines import Install
from specflow.serving.family import launch_for
from specflow.targets.fetch import read_checkpoint
from specflow.tune.acceptance import acceptance_length, walk
from specflow.tune.candidates import Candidate, CostModel
from specflow.tune.cut import by_frequency, cut_draft
from specflow.tune.workbench import ModelBench
from tests import ROOT
from tests.toys import make_project_inputs, tiny_params

Project = tuple[Params, Paths]
CANDIDATES = [
    Candidate(1),
    Candidate(4),
    Candidate(2, 2, 4),
    Candidate(4, 2, 8),
    Candidate(3, 4, 6),
    Candidate(3, 6, 19),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A random draft over the 10 tokens that the target says most to some prompts: wide trees are right at times."""
    folder = tmp_path_factory.mktemp("tune")
    make_project_inputs(folder)
    raw = tiny_params(folder)
    raw["families"]["tiny"]["bench"] |= {"max_new_tokens": 24, "num_prompts": 2}
    params = parse_params(raw)
    raw["families"]["tiny"]["bench"]["max_new_tokens"] = 8  # what the command does takes seconds
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    paths = Paths(root=folder, family="tiny", cache=folder / "cache")
    facts = read_checkpoint(params.families["tiny"].target, folder / "target", paths.cache)
    write_json(paths.target, facts.model_dump())
    prompts = [
        {"id": f"h{i}", "category": "chat", "messages": [{"role": "user", "content": f"the cat sees {i} dogs"}]}
        for i in range(14)
    ]
    write_jsonl(paths.prompts / "eval.jsonl", prompts)
    said = _answers(folder / "target", [row["messages"][0]["content"] for row in prompts[:3]])
    often = torch.bincount(said, minlength=facts.vocab_size).argsort(descending=True)[:10].sort().values
    shape = {name: value for name, value in facts.model_dump().items() if name in Eagle3Config.model_fields}
    config = Eagle3Config(
        **shape,
        target_hidden_size=facts.hidden_size,
        draft_vocab_size=10,
        aux_layer_ids=facts.default_aux_layer_ids(),
    )
    torch.manual_seed(0)
    draft = Eagle3Draft(config)
    draft.d2t.copy_(often - torch.arange(10))
    draft.t2d[often] = True
    save_export(draft, facts, paths.export / "eagle3")
    rows = [{"id": "s0", "category": "chat", "token_ids": said.tolist(), "spans": [[0, len(said)]]}]
    write_jsonl(paths.samples / "train.jsonl", rows)
    return params, paths


def _answers(target: Path, prompts: list[str]) -> torch.Tensor:
    """What the target says to `prompts`, all in one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    said = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        said.append(out[0, ids["input_ids"].shape[1] :])
    return torch.cat(said)


@pytest.fixture(scope="module")
def bench(project: Project) -> Iterator[ModelBench]:
    params, paths = project
    made = ModelBench("tiny", params.families["tiny"], params, paths, max_nodes=18)
    yield made
    made.close()


@pytest.mark.parametrize("size", [None, 6])
def test_what_is_predicted_is_what_decoding_takes(bench: ModelBench, size: int | None) -> None:
    """Steps of every answer, from one pass over it, against those that decoding with each candidate has."""
    questions = [q for q in bench.pool if q.question_id in ("h0", "h2")]
    answers = [bench.answer(question, {1: 4, 2: 4, 4: 3, 6: 3}, size) for question in questions]
    candidates = [candidate.cut(size) for candidate in CANDIDATES]
    records = bench.measure(candidates, questions, f"exact-{size}")
    lengths = []
    for candidate in candidates:
        for number, question in enumerate(questions):
            (own,) = [r for r in records if r.engine == candidate.name and r.question_id == question.question_id]
            steps, accepted = walk(answers[number][candidate.top_k], candidate)
            assert (len(own.steps), sum(a for _, a in own.steps)) == (steps, accepted), candidate.name
        of_all = [r for r in records if r.engine == candidate.name]
        lengths.append(acceptance_length([answer[candidate.top_k] for answer in answers], candidate))
        assert acceptance(of_all, candidate.depth).length == pytest.approx(lengths[-1])
    assert lengths[-1] > 1.2, "the widest tree is right often enough for this to mean something"
    alone = {r.question_id: r.token_ids for r in records if r.engine == BASELINE}
    assert all(r.token_ids == alone[r.question_id] for r in records)


def test_prompts_of_the_benchmark_are_left_out(bench: ModelBench, project: Project) -> None:
    searched, fresh = bench.split(3)
    ids = [q.question_id for q in [*searched, *fresh]]
    # 14 held out: 1 that the benchmark's sweep uses, which comes first, and of the other 13 those 2 that it asks
    assert len(bench.pool) == 12 and len(searched) == 3 and len(fresh) == 6 and len(set(ids)) == 9
    assert bench.pool[0].question_id == "h0" and not {"h1", "h7"} & {q.question_id for q in bench.pool}


def test_costs_have_every_part_and_more_rows_cost_more(bench: ModelBench) -> None:
    costs = bench.costs(None, 0.5)
    assert list(costs.verify_ms) == [1, 2, 3, 4, 6, 8, 12, 16]
    draft = costs.draft_ms
    assert list(draft.ingest_by_rows) == [*INGESTED]
    assert list(draft.step_by_rows) == list(draft.tree_by_rows) == [1, 2, 4, 8]
    assert draft.tree_by_rows[1] == 0.0 and draft.step == draft.step_by_rows[1] > 0.0
    assert costs.target_ms == costs.verify_ms[1] > 0.0 and costs.context > 20
    assert CostModel.of(StepCosts.model_validate(costs.to_json())).verify_ms == costs.verify_ms
    cut = bench.costs(6, 0.1)
    assert cut.target_ms == costs.target_ms and cut.draft_ms != costs.draft_ms


def test_costs_leave_a_session_that_drafts_as_before(bench: ModelBench) -> None:
    """Measuring overwrites caches; the next sequence starts from nothing."""
    session, question = bench._session(None), bench.pool[0]
    before = bench.answer(question, {2: 3}, None)[2].ranks.tolist()
    measure_costs(bench._target, session, [1, 4], 50, top_ks=[4], limit_s=0.05)
    assert bench.answer(question, {2: 3}, None)[2].ranks.tolist() == before
    with pytest.raises(UserError, match="9999 tokens do not fit the context"):
        measure_costs(bench._target, session, [9999], 50)


def test_a_cut_head_proposes_what_the_whole_one_likes_best_among_what_is_kept(project: Project) -> None:
    paths = project[1]
    draft = load_export(paths.export / "eagle3")
    order = by_frequency(draft, paths.samples / "train.jsonl", always=[2])
    target_ids = (draft.d2t + torch.arange(10))[order].tolist()
    said = json.loads((paths.samples / "train.jsonl").read_text())["token_ids"]
    counts = [said.count(token) for token in target_ids]
    start = int(target_ids[0] == 2)  # an end token comes first, however rare
    assert counts[start:] == sorted(counts[start:], reverse=True)
    small = cut_draft(draft, order[:6])
    kept = (small.d2t + torch.arange(6)).tolist()
    assert sorted(kept) == kept == sorted(target_ids[:6]) and small.t2d.nonzero().flatten().tolist() == kept
    hidden = torch.randn(5, draft.config.hidden_size)
    whole = draft.logits(hidden)[:, order[:6].sort().values]
    assert torch.allclose(small.logits(hidden), whole)


def tune(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.chdir(project[1].root)
    return CliRunner().invoke(cli, ["tune", "tiny", "--max-nodes", "7", "--prompts", "2", *arguments])


def test_the_command_writes_what_it_found(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from specflow.tune import command

    text = (project[1].root / "params.yaml").read_text()
    output = tmp_path / "tuned"
    found: list[Any] = []
    search = command.tune
    monkeypatch.setattr(command, "tune", lambda *args: found.append(search(*args)) or found[0])
    done = tune(project, monkeypatch, "--budget-s", "30", "--output", str(output))
    assert done.exit_code == 0, done.output
    report = json.loads((output / "tune.json").read_text())
    assert report["verdict"] in done.output and "A server's costs differ" in done.output
    assert (project[1].root / "params.yaml").read_text() == text, "only --write writes"
    assert not set(report["prompts"]["search"]) & set(report["prompts"]["confirmation"])
    page = (output / "tune.html").read_text()
    assert "Speed against steps" in page and "<svg" in page and "http-equiv" not in page
    assert json.loads((output / "points.jsonl").read_text().splitlines()[0])["steps"] == 0
    assert not (project[1].state / "tune.jsonl").exists()
    # the same again, but for a recommendation that does not depend on this machine's clock
    monkeypatch.setattr(command, "tune", lambda *args: found[0])
    monkeypatch.setattr(command, "recommend", lambda found: Speculation(num_speculative_tokens=0))
    done = tune(project, monkeypatch, "--budget-s", "30", "--write")
    assert "Written to families.tiny.serve.speculative" in done.output
    changed = yaml.safe_load((project[1].root / "params.yaml").read_text())
    assert changed["families"]["tiny"]["serve"] == {"speculative": {"num_speculative_tokens": 0}}
    del changed["families"]["tiny"]["serve"]
    assert changed == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-s", "0.01"], r"a budget of 0.01 s is too small: .*give --budget-s \d+ or more"),
        (["--max-nodes", "0"], "--max-nodes"),
    ],
)
def test_bad_input_is_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    done = tune(project, monkeypatch, *arguments)
    assert done.exit_code != 0
    if isinstance(done.exception, UserError):
        assert "\n" not in str(done.exception)
        assert re.search(message, str(done.exception))
    else:
        assert message in done.output


def test_no_export_and_no_prompts_are_one_line(project: Project, tmp_path: Path) -> None:
    params, paths = project
    family = params.families["tiny"]
    elsewhere = Paths(tmp_path, "tiny", paths.cache)
    with pytest.raises(UserError, match=r"target.* is missing: run `.*fetch"):
        ModelBench("tiny", family, params, elsewhere, 7)
    write_json(elsewhere.target, json.loads(paths.target.read_text()))
    with pytest.raises(UserError, match=r"export config .* is missing: run `specflow export <family>` first"):
        ModelBench("tiny", family, params, elsewhere, 7)
    for part in ("config.json", "model.safetensors"):
        copy = elsewhere.export / "eagle3" / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((paths.export / "eagle3" / part).read_bytes())
    with pytest.raises(UserError, match=r"held-out prompts .* is missing: run `specflow prepare <family>` first"):
        ModelBench("tiny", family, params, elsewhere, 7)
    rows = [json.loads(line) for line in (paths.prompts / "eval.jsonl").read_text().splitlines()]
    write_jsonl(elsewhere.prompts / "eval.jsonl", rows[:5])
    with pytest.raises(UserError, match=r"3 held-out prompts are left beside the benchmark's own, tuning needs 4"):
        ModelBench("tiny", family, params, elsewhere, 7)


def test_serve_drafts_as_was_tuned(project: Project) -> None:
    params, paths = project
    installs = {name: Install(name, Path("/v/bin/python"), "1", on_cpu=False) for name in ("vllm", "sglang")}  # type: ignore[arg-type]

    def words(engine: Any, speculative: dict[str, Any] | None, **options: Any) -> list[str]:
        family = params.families["tiny"]
        serve = family.serve.model_copy(
            update={"speculative": None if speculative is None else Speculation.model_validate(speculative)}
        )
        family = family.model_copy(update={"serve": serve})
        given = {"draft": None, **options}
        return launch_for(family, "tiny", paths, engine=engine, port=1, install=installs[engine], **given).argv

    def k_of(argv: list[str]) -> Any:
        if "--speculative-config" not in argv:
            return None
        return json.loads(argv[argv.index("--speculative-config") + 1])["num_speculative_tokens"]

    def shape(argv: list[str]) -> Any:
        names = ("num-steps", "eagle-topk", "num-draft-tokens")
        if f"--speculative-{names[0]}" not in argv:
            return None
        return tuple(argv[argv.index(f"--speculative-{name}") + 1] for name in names)

    tree = {"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 8}
    tuned = {"num_speculative_tokens": 5, "sglang": tree}
    assert k_of(words("vllm", None)) == 2  # export.num_speculative_tokens
    assert k_of(words("vllm", tuned)) == 5 and shape(words("sglang", tuned)) == ("3", "4", "8")
    assert k_of(words("vllm", tuned, num_speculative_tokens=1)) == 1
    assert shape(words("sglang", tuned, num_speculative_tokens=1)) == ("1", "1", "2")
    assert k_of(words("vllm", tuned, draft=False)) is None and shape(words("sglang", tuned, draft=False)) is None
    none = {"num_speculative_tokens": 0}
    assert k_of(words("vllm", none)) is None and k_of(words("vllm", none, draft=True)) == 2
    assert k_of(words("vllm", none, num_speculative_tokens=3)) == 3
    only_tree = {"num_speculative_tokens": 0, "sglang": tree}
    assert k_of(words("vllm", only_tree)) is None and shape(words("sglang", only_tree)) == ("3", "4", "8")


def test_what_is_tuned_makes_no_stage_stale() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    read = {param for stage in stages.values() for param in stage.get("params", [])}
    assert "families.${item.family}.bench" in read
    assert not [
        param for param in read if param.endswith("${item.family}") or param.startswith("families.${item.family}.serve")
    ]


def test_a_chain_in_sglangs_words_counts_the_root() -> None:
    raw = tiny_params(Path("/nowhere"))
    sglang = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 3}
    raw["families"]["tiny"]["serve"] = {"speculative": {"num_speculative_tokens": 3, "sglang": sglang}}
    with pytest.raises(UserError, match=r"a chain of 3 steps has 4, SGLang counts the root"):
        parse_params(raw)
