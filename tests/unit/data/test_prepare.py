"""Prepare: what is kept, that the splits are disjoint, stable and free of benchmark prompts, and its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from specflow import config
from specflow.data import prepare
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.targets import fetch
from specflow.targets.model import load_tokenizer, read_facts
from specflow.targets.template import encode, render
from tests.toys import make_conversations, make_prompt_set_file, make_tiny_target

BENCHMARK = "please count every letter of the quiet old garden near the river before the cat sees it"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


def prepared(
    project: Path, tiny: Path, records: list[Any], *, sample: dict[str, Any] | None = None, **data: Any
) -> tuple[dict[str, float], dict[str, list[Any]], Any]:
    """Run fetch and prepare on `records`; return metrics, rows by split and the report."""
    project.mkdir(exist_ok=True)
    source = project / "data.json"
    source.write_text(json.dumps(records))
    questions = make_prompt_set_file(project / "q.jsonl", 3)
    with questions.open("a") as stream:
        stream.write(json.dumps({"question_id": "own", "category": "x", "turns": ["Short one?", BENCHMARK]}) + "\n")
    options: dict[str, Any] = {
        "train_conversations": 6,
        "eval_conversations": 3,
        "max_prompt_tokens": 256,
        **data,
    }
    params = config.parse_params(
        {
            "prompt_sets": {"mine": {"source": f"file:{questions}"}},
            "families": {
                "tiny": {
                    "target": {"source": f"file:{tiny}"},
                    "data": {"sources": [{"source": f"file:{source}"}], **options},
                    "sample": sample or {},
                    "vocab": {"draft_vocab_size": 128},
                }
            },
        }
    )
    paths = Paths(project, "tiny", project / "cache")
    fetch.run("tiny", params.family("tiny"), params, paths, lambda values, step: None)
    metrics = prepare.run("tiny", params.family("tiny"), params, paths, lambda values, step: None)
    rows = {
        split: [json.loads(line) for line in (paths.prompts / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    }
    return metrics, rows, json.loads((paths.prompts / "data_report.json").read_text())


def first_turns(rows: list[Any]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def ask(*turns: str) -> dict[str, Any]:
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "the cat"}]
    return {"messages": messages}


def test_counts_rows_and_report(tmp_path: Path, tiny: Path) -> None:
    records = make_conversations(12)
    broken = {"id": "x", "conversations": [{"from": "gpt", "value": "no question"}]}
    metrics, rows, report = prepared(tmp_path, tiny, [*records, broken, records[0]])
    assert (metrics["records"], metrics["dropped_records"], metrics["duplicates"]) == (14, 1, 1)
    assert (len(rows["train"]), len(rows["eval"])) == (6, 3)
    assert report["sources"][0]["dropped_records"] == {"assistant before any user turn": 1}
    assert report["distinct_conversations"] == 12
    assert report["train"]["conversations"] == metrics["train_conversations"] == 6
    row = rows["train"][0]
    assert set(row) == {"id", "source", "category", "group", "messages"}
    assert row["category"] == "general"
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(set(ids)) == 9


def test_same_seed_same_rows_other_seed_other_split(tmp_path: Path, tiny: Path) -> None:
    records = make_conversations(30)
    _, one, _ = prepared(tmp_path / "a", tiny, records)
    _, two, _ = prepared(tmp_path / "a", tiny, list(reversed(records)))
    assert one == two  # the order of the file does not matter either
    _, other, _ = prepared(tmp_path / "a", tiny, records, seed=1)
    assert first_turns(other["eval"]) != first_turns(one["eval"])


def test_more_data_or_more_rows_never_move_a_conversation_across(tmp_path: Path, tiny: Path) -> None:
    records = make_conversations(60)
    _, few, _ = prepared(tmp_path / "a", tiny, records[:30])
    _, longer, _ = prepared(tmp_path / "a", tiny, records[:30], train_conversations=12)
    assert longer["train"][:6] == few["train"]
    assert longer["eval"] == few["eval"]
    _, more, _ = prepared(tmp_path / "a", tiny, records)
    assert not first_turns(more["train"]) & first_turns(few["eval"])
    assert not first_turns(more["eval"]) & first_turns(few["train"])


def test_eval_and_train_share_no_first_user_turn(tmp_path: Path, tiny: Path) -> None:
    records = [ask(f"question {i % 3}", f"follow up {i}") for i in range(30)]
    _, rows, _ = prepared(tmp_path, tiny, records, train_conversations=8, eval_conversations=4)
    assert not first_turns(rows["train"]) & first_turns(rows["eval"])
    assert len(rows["eval"]) == 4


def parts(conversations: int, each: int, *, key: str = "id", form: str = "{c}_{n}") -> list[dict[str, Any]]:
    """ShareGPT as cut by length: record n of conversation c asks what only that conversation is about."""
    records = []
    for c in range(conversations):
        for n in range(each):
            turns = [{"from": "human", "value": f"subject{c} part{n}"}, {"from": "gpt", "value": "the cat"}]
            records.append({key: form.format(c=f"x{c}y", n=2 * n), "conversations": turns})
    return records


def subjects(rows: list[Any]) -> set[str]:
    return {row["messages"][0]["content"].split()[0] for row in rows}


@pytest.mark.parametrize(
    ("key", "form"), [("id", "{c}_{n}"), ("id", "{c}"), ("id", "{c}-part{n}"), ("conversation_id", "{c}")]
)
def test_parts_of_one_conversation_stay_on_one_side(tmp_path: Path, tiny: Path, key: str, form: str) -> None:
    records = parts(12, 5, key=key, form=form)
    metrics, rows, report = prepared(tmp_path, tiny, records, train_conversations=30, eval_conversations=7)
    assert not subjects(rows["train"]) & subjects(rows["eval"])
    assert metrics["conversation_groups"] == report["conversation_groups"] == 12
    assert report["eval"]["groups"] == len(subjects(rows["eval"])) == 2  # 7 of 10 records: whole conversations
    assert metrics["eval_relatives"] == report["dropped_conversations"]["belongs to a conversation of eval"] == 3


def test_a_copy_under_another_id_brings_its_parts_along(tmp_path: Path, tiny: Path) -> None:
    records = parts(12, 3)
    for record in parts(12, 3):
        stem, _, number = str(record["id"]).partition("_")
        subject = int(stem[1:-1])
        if number != "0":  # the copy begins alike and is cut elsewhere
            record["conversations"] = [{"from": "human", "value": f"subject{subject} more{number}"}]
        records.append({**record, "id": f"copy{stem}_{number}"})
    metrics, rows, _ = prepared(tmp_path, tiny, records, train_conversations=20, eval_conversations=4)
    assert metrics["duplicates"] == 12
    assert not subjects(rows["train"]) & subjects(rows["eval"])


@pytest.mark.parametrize("form", ["sample_{n}", "constant"])
def test_a_running_number_is_no_conversation(tmp_path: Path, tiny: Path, form: str) -> None:
    records = [{**ask(f"question {n}"), "id": form.format(n=n)} for n in range(12)]
    metrics, _, _ = prepared(tmp_path, tiny, records)
    assert metrics["conversation_groups"] == 12
    assert metrics["eval_relatives"] == 0


def test_train_repeats_no_turn_of_eval(tmp_path: Path, tiny: Path) -> None:
    """Each turn and each run of 13 words stands in two conversations: one of a pair in eval, the other is dropped."""
    records = []
    for n in range(12):
        words = " ".join(f"{word}{n}" for word in BENCHMARK.split()[:13])
        records += [ask(f"first {n}", f"again {n}"), ask(f"second {n}", f"Again, {n}!")]
        records += [ask(f"third {n} {words}"), ask(f"fourth {n}: {words.upper()} ?")]
    metrics, rows, report = prepared(tmp_path, tiny, records, train_conversations=24, eval_conversations=12)
    kinds = {"first": "a", "second": "a", "third": "b", "fourth": "b"}

    def secrets(split: str) -> set[tuple[str, str]]:
        said = [row["messages"][0]["content"].replace(":", "").split() for row in rows[split]]
        return {(kinds[words[0]], words[1]) for words in said}

    assert not secrets("train") & secrets("eval")
    dropped = report["dropped_conversations"]["repeats a turn of eval"]
    assert metrics["eval_overlaps"] == dropped >= 11  # of 12: the last may not have been looked at


def test_wording_of_the_whole_data_set_is_no_overlap(tmp_path: Path, tiny: Path) -> None:
    wording = " ".join(reversed(BENCHMARK.split()))
    records = [ask(f"{wording} {n}", "go on") for n in range(12)]
    metrics, _, _ = prepared(tmp_path, tiny, records, train_conversations=9, eval_conversations=3)
    assert metrics["eval_overlaps"] == 0


def test_overlapping_conversations_are_removed_and_counted(tmp_path: Path, tiny: Path) -> None:
    clean = [ask(f"question number {i}") for i in range(9)]
    dirty = [ask("Short one?"), ask(f"now {BENCHMARK}")]
    metrics, rows, report = prepared(tmp_path, tiny, [*clean, *dirty], train_conversations=6, eval_conversations=3)
    texts = json.dumps(rows)
    assert "Short one" not in texts
    assert BENCHMARK not in texts
    assert report["dropped_conversations"].get("overlaps mine", 0) == metrics["benchmark_overlaps"]
    assert metrics["train_conversations"] == 6
    with pytest.raises(UserError, match=r"have 9 usable conversations, expected 7 to train and 3 .*'overlaps mine': 2"):
        prepared(tmp_path, tiny, [*clean, *dirty], train_conversations=7)


def test_turn_and_token_limits(tmp_path: Path, tiny: Path) -> None:
    records = [ask(f"q {i}", "b", "c", "d") for i in range(9)]
    _, rows, _ = prepared(tmp_path, tiny, records, max_turns=2)
    assert {len(row["messages"]) for row in rows["train"]} == {4}
    long = "cat dog bird " * 40
    records = [ask(f"q {i}", long) for i in range(9)] + [ask(f"{i} {long}") for i in range(5)]
    _, rows, report = prepared(tmp_path, tiny, records, max_prompt_tokens=60)
    assert {len(row["messages"]) for row in rows["train"] + rows["eval"]} == {2}
    assert set(report["dropped_conversations"]) <= {"first prompt is longer than max_prompt_tokens"}
    paths = Paths(tmp_path, "tiny", tmp_path / "cache")
    tokenizer = load_tokenizer(read_facts(paths.target), paths.cache)
    tokens = [len(encode(tokenizer, render(tokenizer, row["messages"][:1], True))) for row in rows["train"]]
    assert report["train"]["prompt_tokens"]["total"] == sum(tokens)
    assert report["train"]["prompt_tokens"]["max"] == max(tokens) <= 60


def test_prompt_limit_must_leave_room_in_the_context(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"max_prompt_tokens 512 leaves no room .*512 tokens"):
        prepared(tmp_path, tiny, make_conversations(12), max_prompt_tokens=512)


def test_dataset_engine_needs_answers(tmp_path: Path, tiny: Path) -> None:
    answered = [ask(f"question {i}") for i in range(9)]
    for record in answered:
        record["messages"].append({"role": "user", "content": "unanswered"})
    bare = [{"messages": [{"role": "user", "content": f"bare {i}"}]} for i in range(4)]
    _, rows, _ = prepared(tmp_path, tiny, [*answered, *bare], sample={"engine": "dataset"})
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows["train"] + rows["eval"])
    with pytest.raises(UserError, match=r"have 9 usable .*has no answers of its own"):
        prepared(tmp_path, tiny, [*answered, *bare], sample={"engine": "dataset"}, train_conversations=7)


def test_a_template_that_refuses_system_messages_drops_and_counts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    target = make_tiny_target(tmp_path / "target", chat_template=template)
    records = [ask(f"question {i}") for i in range(9)]
    system = [{"messages": [{"role": "system", "content": "s"}, *ask(f"other {i}")["messages"]]} for i in range(3)]
    with pytest.raises(UserError, match=r"chat template refuses it \(first role system\)': 3"):
        prepared(tmp_path / "project", target, [*records, *system], train_conversations=8)
    _, rows, _ = prepared(tmp_path / "project", target, [*records, *system])
    assert {row["messages"][0]["role"] for row in rows["train"] + rows["eval"]} == {"user"}


def test_what_was_dropped_is_said_when_prepare_ends(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.logger, "propagate", True)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "lookup", "arguments": "{}"}}]}
    called = [
        {"messages": [ask(f"look {i}")["messages"][0], call, {"role": "tool", "content": "12"}]} for i in range(3)
    ]
    other = [{"messages": [{"role": "narrator", "content": "once"}]}, {**ask("fine"), "model": "m"}]
    records = [*(ask(f"question {i}") for i in range(8)), *called, *other, ask("question 1")]
    with caplog.at_level("INFO", logger="specflow"):
        _, rows, _ = prepared(tmp_path, tiny, records, sample={"engine": "dataset"})
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("prepare: ")]
    assert lines[0].endswith(
        "data.json (messages): 14 records, 13 conversations; records dropped: unknown role 'narrator' 1; "
        "fields not used: model 1"
    )
    assert "duplicate 1" in lines[1] and "look" not in json.dumps(rows)
    with pytest.raises(UserError, match=r"'tool calls, which the chat template does not show': 3"):
        prepared(tmp_path, tiny, records, sample={"engine": "dataset"}, train_conversations=7)
    _, asked, _ = prepared(tmp_path, tiny, records, train_conversations=9)
    looked = [row["messages"] for split in asked.values() for row in split if "look" in json.dumps(row)]
    assert looked and all(len(messages) == 1 for messages in looked)  # asked, and nothing joined behind it
