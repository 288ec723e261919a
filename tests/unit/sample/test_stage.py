"""Sampling: equal to transformers' own generate(), independent of the batch, resumable."""

import itertools
import json
import random

import pytest
import torch
from scipy import stats

from specflow.errors import UserError
from specflow.files import read_jsonl
from specflow.sample import dialogue, generation
from specflow.sample import stage as sampling
from specflow.sharding.shares import MERGE, Share
from specflow.targets import template
from specflow.targets.model import load_model, load_tokenizer
from tests.captures import tiny_project, write_split
from tests.toys import WORDS, make_tiny_target

# History holds the turn number, so that a later turn changes what stood before.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ messages | length }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny target that ends many of its answers itself: its head leans towards the end token."""
    return lean_to_end(make_tiny_target(tmp_path_factory.mktemp("target") / "tiny"))


def lean_to_end(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[model.generation_config.eos_token_id] *= 2.0
    model.save_pretrained(folder)
    return folder


def make_prompts(count, *, seed=0, max_turns=3):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": "quiet old dog"}] if number % 3 == 0 else []
        for _ in range(rng.randint(1, max_turns)):
            messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))})
            messages.append({"role": "assistant", "content": "not used"})
        rows.append({"id": f"c{seed}-{number}", "source": "s", "category": "x", "messages": messages[:-1]})
    return rows


def generate_one(model, tokenizer, facts, row, max_new_tokens, limit):
    """The same conversation by transformers' generate(), one at a time."""
    users = [message["content"] for message in row["messages"] if message["role"] == "user"]
    messages = [message for message in row["messages"] if message["role"] == "system"]
    tokens, spans, reasons, text = [], [], [], ""
    for number, user in enumerate(users):
        if number == 0:
            messages.append({"role": "user", "content": user})
            prompt = template.encode(tokenizer, template.render(tokenizer, messages, True))
        else:
            suffix = template.next_turn_suffix(tokenizer, messages, text, user)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": user}]
            prompt = tokens + template.encode(tokenizer, suffix)
            if len(prompt) + max_new_tokens > limit:
                break
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=facts.eos_token_ids,
        )
        tokens = output[0].tolist()
        spans.append([len(prompt), len(tokens)])
        stopped = tokens[-1] in facts.eos_token_ids
        reasons.append("stop" if stopped else "length")
        text = tokenizer.decode(tokens[len(prompt) : len(tokens) - stopped], skip_special_tokens=True)
        if not stopped:
            break
    return tokens, spans, reasons


def read(paths, split="train"):
    return [json.loads(line) for line in (paths.samples / f"{split}.jsonl").read_text().splitlines()]


def complete(project, conversations, batch_size=4, max_new_tokens=12):
    facts, cache = project.facts, project.paths.cache
    done = generation.complete(
        conversations,
        model=load_model(facts, cache),
        turns=dialogue.Turns(
            load_tokenizer(facts, cache), facts.eos_token_ids, max_new_tokens=max_new_tokens, max_length_tokens=400
        ),
        batch_size=batch_size,
    )
    return {item["id"]: item["rows"] for item in done}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_generate_one_by_one(tmp_path, target, batch_size):
    project = tiny_project(tmp_path, target, sample={"batch_size": batch_size, "max_new_tokens": 16})
    prompts = make_prompts(17)
    write_split(project.paths.prompts, prompts[:12], prompts[12:])
    metrics = project.run(sampling)
    model, tokenizer = (
        load_model(project.facts, project.paths.cache),
        load_tokenizer(project.facts, project.paths.cache),
    )
    rows = read(project.paths) + read(project.paths, "eval")
    assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        tokens, spans, reasons = generate_one(model, tokenizer, project.facts, prompt, 16, 400)
        assert row["token_ids"] == tokens and row["spans"] == spans
        assert [turn["finish_reason"] for turn in row["turns"]] == reasons
        assert row["engine"].startswith("transformers 5") and row["temperature"] == 0.0
    reasons = [turn["finish_reason"] for row in rows for turn in row["turns"]]
    assert {"stop", "length"} == set(reasons) and max(
        len(row["spans"]) for row in rows
    ) > 1  # the case is worth its name
    assert metrics["finished_by_length"] == reasons.count("length")
    assert metrics["generated_tokens"] == sum(end - start for row in rows for start, end in row["spans"])
    assert metrics["rows"] == 17 and metrics["train_rows"] == 12 and metrics["turns"] == len(reasons)
    assert not list(project.paths.state.rglob("sample-*"))


def test_no_further_turn_is_asked_where_its_answer_might_not_fit(tmp_path, target):
    project = tiny_project(tmp_path, target, extract={"max_length_tokens": 120}, sample={"max_new_tokens": 16})
    prompts = [
        row
        for row in make_prompts(24, seed=4)
        if len(row["messages"]) > 1 and sum(len(m["content"]) for m in row["messages"][:2]) < 90
    ]
    write_split(project.paths.prompts, prompts, [])
    project.run(sampling)
    model, tokenizer = (
        load_model(project.facts, project.paths.cache),
        load_tokenizer(project.facts, project.paths.cache),
    )
    for prompt, row in zip(prompts, read(project.paths), strict=True):
        assert row["token_ids"] == generate_one(model, tokenizer, project.facts, prompt, 16, 120)[0]
        assert len(row["token_ids"]) <= 120


def test_a_draw_does_not_depend_on_the_batch_and_differs_by_seed(tmp_path, target):
    project = tiny_project(tmp_path, target)
    prompts = make_prompts(8, seed=1)

    def ask(rows, seed, **options):
        return complete(
            project, [generation.Conversation(r["id"], "x", r["messages"], 0.9, seed) for r in rows], **options
        )

    together = ask(prompts, 0, batch_size=5)
    assert together == ask(prompts[::-1], 0, batch_size=2)
    assert together[prompts[3]["id"]] == ask(prompts[3:4], 0)[prompts[3]["id"]]
    assert together != ask(prompts, 1, batch_size=5)


def test_draw_follows_the_softmax_at_its_temperature():
    logits, count = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf]), 20_000
    noise = torch.empty(count, 5).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = generation.draw(logits.expand(count, -1), [0.7] * count, noise).bincount(minlength=5)
    expected = (logits / 0.7).softmax(0) * count
    assert drawn[4] == 0
    assert stats.chisquare(drawn[:4].double().numpy(), expected[:4].double().numpy(), sum_check=False).pvalue > 1e-3
    assert generation.draw(logits[None], [1.0], torch.tensor([[9.0, 1.0, 0.1, 9.0, 1e-9]])).item() == 2


def test_a_draw_is_indifferent_to_rounding():
    """What differs between batches is the last bits of the logits; inverting a cumulative sum turned 1 draw in 1000."""
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 20_000, generator=stream) * 3
    noise = torch.empty_like(logits).exponential_(generator=stream)
    rounded = logits * (1 + 1e-7 * torch.randn(logits.shape, generator=stream))
    temperatures = [0.8] * len(logits)
    assert torch.equal(generation.draw(logits, temperatures, noise), generation.draw(rounded, temperatures, noise))


def test_temperature_is_drawn_by_id_and_eval_has_its_own(tmp_path, target):
    sample = {"temperatures": [0.0, 0.8], "eval_temperature": 0.5, "max_new_tokens": 2}
    project = tiny_project(tmp_path, target, sample=sample)
    prompts = make_prompts(24, max_turns=1)
    write_split(project.paths.prompts, prompts[:20], prompts[20:])
    project.run(sampling)
    by_id = {row["id"]: row["temperature"] for row in read(project.paths)}
    assert 4 <= list(by_id.values()).count(0.8) <= 16
    assert {row["temperature"] for row in read(project.paths, "eval")} == {0.5}
    write_split(project.paths.prompts, prompts[10:20], prompts[20:])
    project.run(sampling)
    assert {row["id"]: row["temperature"] for row in read(project.paths)}.items() <= by_id.items()


def test_a_template_that_rewrites_history_splits_the_conversation(tmp_path):
    folder = lean_to_end(make_tiny_target(tmp_path / "target", chat_template=REWRITING))
    project = tiny_project(tmp_path, folder, sample={"max_new_tokens": 16})
    prompts = make_prompts(12)
    write_split(project.paths.prompts, prompts, [])
    project.run(sampling)
    rows = read(project.paths)
    tokenizer = load_tokenizer(project.facts, project.paths.cache)
    split = [row for row in rows if "#" in row["id"]]
    assert any(row["id"].endswith("#1") for row in split) and all(len(row["spans"]) == 1 for row in rows)
    first, second = next((a, b) for a, b in itertools.pairwise(rows) if b["id"].endswith("#1"))
    conversation = next(row for row in prompts if row["id"] == first["id"].split("#")[0])
    users = [message for message in conversation["messages"] if message["role"] == "user"]
    system = [message for message in conversation["messages"] if message["role"] == "system"]
    history = [*system, users[0], {"role": "assistant", "content": first["turns"][0]["text"]}, users[1]]
    start = second["spans"][0][0]
    assert second["token_ids"][:start] == template.encode(tokenizer, template.render(tokenizer, history, True))


def test_killed_and_resumed_equals_uninterrupted(tmp_path, target):
    prompts = make_prompts(14, seed=2)
    sample = {"temperatures": [0.0, 0.9], "batch_size": 3}
    whole, killed = (tiny_project(tmp_path / name, target, sample=sample) for name in ("whole", "killed"))
    for project in (whole, killed):
        write_split(project.paths.prompts, prompts[:10], prompts[10:])
    whole.run(sampling)
    killed.run_killed(
        "specflow.sample.stage",
        "append, count = stage.RowLog.append, [0]\n"
        "def killing(self, row):\n"
        "    count[0] += 1\n"
        "    if count[0] == 7:\n"
        '        self._stream.write(\'{"id": "torn\'); self._stream.flush(); kill()\n'
        "    append(self, row)\n"
        "stage.RowLog.append = killing",
    )
    assert not (killed.paths.samples / "train.jsonl").exists()
    metrics = killed.run(sampling)
    assert metrics["resumed_conversations"] == 6
    for split in ("train", "eval"):
        one, other = (p.paths.samples / f"{split}.jsonl" for p in (whole, killed))
        assert one.read_bytes() == other.read_bytes()


def test_other_settings_do_not_resume(tmp_path, target):
    project = tiny_project(tmp_path, target)
    write_split(project.paths.prompts, make_prompts(4), [])
    patch = "stage.write_jsonl = lambda *_: kill()"
    project.run_killed("specflow.sample.stage", patch)
    changed = tiny_project(tmp_path, target, sample={"max_new_tokens": 5})
    assert changed.run(sampling)["resumed_conversations"] == 0
    assert max(end - start for row in read(project.paths) for start, end in row["spans"]) == 5


def test_dataset_engine_keeps_the_answers_of_the_data_set(tmp_path, target):
    project = tiny_project(tmp_path, target, sample={"engine": "dataset"})
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sees a dog"},
        {"role": "user", "content": "and"},
    ]
    answered = {"id": "a", "source": "s", "category": "x", "messages": messages}
    write_split(project.paths.prompts, [answered, {**answered, "id": "b", "messages": messages[:1]}], [])
    metrics = project.run(sampling)
    tokenizer = load_tokenizer(project.facts, project.paths.cache)
    (row,) = read(project.paths)
    ((start, end),) = row["spans"]
    assert tokenizer.decode(row["token_ids"][start:end]) == "sees a dog<|im_end|>"
    assert row["engine"] == "dataset" and row["turns"] == [{"text": "sees a dog", "finish_reason": "stop"}]
    assert metrics["rows"] == 1 and metrics["generated_tokens"] == end - start


def test_errors_of_the_user(tmp_path, target):
    project = tiny_project(tmp_path, target, extract={"max_length_tokens": 20})
    with pytest.raises(UserError, match=r"prompts .* is missing: run `dvc repro prepare@tiny`"):
        project.run(sampling)
    (row,) = make_prompts(1)
    long = {**row, "messages": [{"role": "user", "content": "river " * 60}]}
    write_split(project.paths.prompts, [long], [])
    with pytest.raises(UserError, match=f"prompt of {row['id']} has .* tokens"):
        project.run(sampling)
    write_split(project.paths.prompts, [row], [row])
    with pytest.raises(UserError, match="twice"):
        project.run(sampling)


def test_logits_that_are_not_finite_name_the_row(tmp_path, target):
    project = tiny_project(tmp_path, target)
    model = load_model(project.facts, project.paths.cache)
    model.model.embed_tokens.weight[5] = torch.nan
    tokenizer = load_tokenizer(project.facts, project.paths.cache)
    messages = [{"role": "user", "content": tokenizer.decode([5])}]
    with pytest.raises(UserError, match="logits of row bad"):
        list(
            generation.complete(
                [generation.Conversation("bad", "x", messages, 0.0, 0)],
                model=model,
                turns=dialogue.Turns(tokenizer, [2], max_new_tokens=4, max_length_tokens=100),
                batch_size=1,
            )
        )


def run_share(project, stage, index, count):
    return stage.run_share("tiny", project.family, project.params, project.paths, Share(index, count))


def run_merge(project, stage):
    return stage.run("tiny", project.family, project.params, project.paths, lambda values, step: None, MERGE)


def test_shares_put_together_equal_one_process(tmp_path, target):
    prompts = make_prompts(17, seed=3)
    sample = {"temperatures": [0.0, 0.9], "batch_size": 3}
    whole, split = (tiny_project(tmp_path / name, target, sample=sample) for name in ("whole", "split"))
    for project in (whole, split):
        write_split(project.paths.prompts, prompts[:12], prompts[12:])
    expected = whole.run(sampling)
    for index in (2, 0, 1):
        run_share(split, sampling, index, 3)
    logs = sorted(path.name for path in split.paths.state.rglob("sample-train*.jsonl"))
    assert logs == [f"sample-train.share-{index}.jsonl" for index in range(3)]
    merged = run_merge(split, sampling)
    for name in ("train", "eval"):
        one, other = (project.paths.samples / f"{name}.jsonl" for project in (whole, split))
        assert one.read_bytes() == other.read_bytes()
    apart = ("tok_s", "resumed_conversations")
    assert {k: v for k, v in merged.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}
    assert merged["resumed_conversations"] == 17 and not list(split.paths.state.rglob("sample-*"))


def test_shares_that_stopped_are_gone_on_with_in_any_number(tmp_path, target):
    project = tiny_project(tmp_path, target)
    prompts = make_prompts(9, seed=6)
    write_split(project.paths.prompts, prompts, [])
    run_share(project, sampling, 1, 4)  # rows 1 and 5
    with pytest.raises(UserError, match="7 rows are missing although every share is done"):
        run_merge(project, sampling)
    assert not (project.paths.samples / "train.jsonl").exists()
    run_share(project, sampling, 0, 2)  # rows 0, 2, 4, 6, 8
    taken = [len(read_jsonl(path)) - 1 for path in sorted(project.paths.state.rglob("sample-train.share-*.jsonl"))]
    assert taken == [5, 2]
    assert project.run(sampling)["resumed_conversations"] == 7
    assert [row["id"] for row in read(project.paths)] == [prompt["id"] for prompt in prompts]
