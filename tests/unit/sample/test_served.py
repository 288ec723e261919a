"""Sampling through servers that misbehave: the stage against tests/fake_engine.py, elsewhere and as a child of ours."""

import logging
import random
import time

import psutil
import pytest

from specflow.config import parse_params
from specflow.errors import RetryableError, UserError
from specflow.extract import vllm
from specflow.files import RowLog, read_jsonl
from specflow.sample import stage as sampling
from specflow.sample.dialogue import Conversation, Turns
from specflow.serving import client as client_module
from specflow.sharding.shares import MERGE, Share
from specflow.targets import template
from specflow.targets.model import load_tokenizer
from tests.captures import tiny_project, write_split
from tests.fake_engine import END, completion, echo, make_venv, serving
from tests.toys import make_tiny_target, make_tiny_tokenizer
from tests.unit.sample.test_stage import REWRITING, make_prompts

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the thinking of earlier answers, as Qwen3's template does."""
PROMPTS = make_prompts(20)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny", hidden_size=16, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.01)


def project(root, target, serve, engine="vllm", **sample):
    made = tiny_project(root, target)
    family = made.settings["families"]["tiny"]
    family["serve"] = serve
    family["sample"] = {"engine": engine, "max_new_tokens": 12, "concurrency": 4, **sample}
    made.params = parse_params(made.settings)
    write_split(made.paths.prompts, PROMPTS[:14], PROMPTS[14:])
    return made


def rows_of(made):
    return [row for split in sampling.SPLITS for row in read_jsonl(made.paths.samples / f"{split}.jsonl")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, target):
    """Rows of a run in which nothing goes wrong."""
    with serving() as server:
        made = project(tmp_path_factory.mktemp("expected"), target, {"url": server.url}, concurrency=1)
        made.run(sampling)
    return rows_of(made)


def test_rows_stand_in_the_order_of_the_prompts_whatever_finishes_first(tmp_path, target, expected):
    rng = random.Random(0)

    def reply(path, body):
        time.sleep(rng.random() * 0.02)
        return echo(path, body)

    with serving(reply) as server:
        made = project(tmp_path, target, {"url": server.url}, concurrency=7)
        metrics = made.run(sampling)
        prompts = [body["prompt"] for _, body in server.seen]
    rows = rows_of(made)
    assert rows == expected and [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert {row["engine"] for row in rows} == {"vllm 9.9"}
    histories = {tuple(row["token_ids"][:start]) for row in rows for start, _ in row["spans"]}
    assert {tuple(prompt) for prompt in prompts} == histories and len(prompts) == len(histories)
    turns = [turn for row in rows for turn in row["turns"]]
    assert max(len(row["spans"]) for row in rows) == 3
    assert metrics["finished_by_length"] == sum(turn["finish_reason"] == "length" for turn in turns) > 0
    assert metrics["turns"] == len(turns) and metrics["rows"] == 20


def test_a_foreign_server_that_goes_away_ends_the_stage_and_a_second_run_goes_on(tmp_path, target, expected):
    asked = []

    def dying(path, body):
        asked.append(body)
        return echo(path, body) if len(asked) <= 15 else (503, {})

    with serving(dying) as server:
        made, port = project(tmp_path, target, {"url": server.url}), server.server_port
        with pytest.raises(
            RetryableError, match=r"gives no answer .*503.* run the stage again when the server answers"
        ):
            made.run(sampling)
    assert not (made.paths.samples / "train.jsonl").exists()
    with serving(port=port) as server:
        metrics = made.run(sampling)
        again = len(server.seen)
    turns = sum(len(row["turns"]) for row in expected)
    assert rows_of(made) == expected
    assert 0 < metrics["resumed_conversations"] < 20 and turns - 15 <= again < turns


def test_a_refused_answer_ends_its_conversation_before_it(tmp_path, target, expected):
    by_turn = {
        tuple(row["token_ids"][:start]): number for row in expected for number, (start, _) in enumerate(row["spans"])
    }

    def reply(path, body):
        refused = by_turn[tuple(body["prompt"])] == 1
        return (200, completion([7], "content_filter", len(body["prompt"]))) if refused else echo(path, body)

    with serving(reply) as server:
        made = project(tmp_path, target, {"url": server.url})
        metrics = made.run(sampling)
    for row, whole in zip(rows_of(made), expected, strict=True):
        assert row["token_ids"] == whole["token_ids"][: whole["spans"][0][1]]
        assert row["spans"] == whole["spans"][:1] and row["turns"] == whole["turns"][:1]
    assert metrics["refused_conversations"] == sum(len(row["turns"]) > 1 for row in expected) > 0


def test_text_alone_is_an_error_unless_it_may_be_tokenised_and_then_the_difference_is_counted(tmp_path, target):
    texts = [b"the cat", b"the \xf0\x9f".decode("utf-8", "replace"), "a river"]
    texts = [text.decode() if isinstance(text, bytes) else text for text in texts]

    def reply(path, body):
        text = texts[len(body["prompt"]) % 3]
        return 200, completion(None, "stop", len(body["prompt"]), text + ("<|im_start|>" if text == "a river" else ""))

    with serving(reply) as server:
        strict = project(tmp_path / "strict", target, {"url": server.url}, "openai")
        with pytest.raises(UserError, match=r"returns no token ids: use a server that does .* serve.retokenise: true"):
            strict.run(sampling)
        made = project(tmp_path / "made", target, {"url": server.url, "retokenise": True}, "openai", max_new_tokens=40)
        metrics = made.run(sampling)
    tokenizer = load_tokenizer(made.facts, made.paths.cache)
    rows = rows_of(made)
    differs = 0
    for row in rows:
        for (start, end), turn in zip(row["spans"], row["turns"], strict=True):
            text = texts[start % 3]
            special = ["<|im_start|>"] if text == "a river" else []
            assert row["token_ids"][start:end] == [*template.encode(tokenizer, text + "".join(special)), END]
            assert turn["round_trip"] == ("differs" if special else "same") and turn["finish_reason"] == "stop"
            differs += bool(special)
    assert metrics["retokenised_turns"] == sum(len(row["turns"]) for row in rows)
    assert metrics["round_trip_differs"] == differs > 0
    assert {row["engine"] for row in rows} == {"openai, version unknown"}


@pytest.mark.parametrize(
    ("token_ids", "reason", "message"),
    [
        ([5, 6], "stop", "stopped its answer to .* at token 6, which is no end token of the target"),
        ([5] * 13, "length", "with 13 tokens, 1 to 12 were asked for"),
        ([], "stop", "with 0 tokens"),
        ([5, 999], "length", "with token 999, the target has 300: another model"),
    ],
)
def test_an_answer_that_the_target_cannot_have_given(tmp_path, target, token_ids, reason, message):
    reply = completion(token_ids, reason, 0)
    reply["usage"] = None
    with serving(lambda path, body: (200, reply)) as server, pytest.raises(UserError, match=message):
        project(tmp_path, target, {"url": server.url}).run(sampling)


def test_settings_that_cannot_be_served(tmp_path, target):
    with pytest.raises(UserError, match=r"sample.engine openai needs serve.url"):
        project(tmp_path / "a", target, {}, "openai")
    with pytest.raises(UserError, match="sglang is not installed in"):
        project(tmp_path / "b", target, {"venv": str(tmp_path)}, "sglang").run(sampling)
    venv = str(make_venv(tmp_path / "venv"))
    with pytest.raises(UserError, match=r"serve.max_model_len = 100 is below the 400 tokens of a conversation"):
        project(tmp_path / "c", target, {"venv": venv, "max_model_len": 100}).run(sampling)
    with pytest.raises(UserError, match=r"no answer from serve.url .*is the server up"):
        project(tmp_path / "d", target, {"url": "http://127.0.0.1:9"}).run(sampling)


def test_gpus_are_dealt_to_the_replicas(tmp_path, target, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    serve = {"venv": str(make_venv(tmp_path / "venv")), "replicas": 2}
    with pytest.raises(UserError, match=r"2 servers of 1 GPUs need 2, the stage holds 1: set families.tiny.resources"):
        project(tmp_path, target, serve).run(sampling)


@pytest.mark.parametrize("how", ["--die-after", "--hang-after"])
def test_a_child_that_dies_or_hangs_is_started_again(tmp_path, target, expected, caplog, monkeypatch, how):
    monkeypatch.setattr(logging.getLogger("specflow"), "propagate", True)
    words = [how, "9", "--once", str(tmp_path / "once")]
    serve = {"venv": str(make_venv(tmp_path / "venv")), "extra_args": words, "request_timeout_s": 0.5}
    made = project(tmp_path, target, serve)
    with caplog.at_level(logging.WARNING, logger="specflow"):
        made.run(sampling)
    assert rows_of(made) == expected
    (lost,) = [record.getMessage() for record in caplog.records if "is lost" in record.getMessage()]
    assert ("exit code 9" if how == "--die-after" else "no answer within serve.request_timeout_s = 0.5 s") in lost


def test_two_replicas_share_the_work_and_one_may_die(tmp_path, target, expected, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # leads nowhere, and is not asked for our own machine
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    log = tmp_path / "answered"
    words = ["--die-after", "12", "--once", str(tmp_path / "once"), "--answered", str(log)]
    serve = {"venv": str(make_venv(tmp_path / "venv")), "replicas": 2, "extra_args": words}
    made = project(tmp_path, target, serve)
    made.run(sampling)
    assert rows_of(made) == expected
    by_process = [log.read_text().split().count(process) for process in set(log.read_text().split())]
    turns = sum(len(row["turns"]) for row in expected)
    assert len(by_process) in (2, 3) and max(by_process) < turns <= sum(by_process)


def test_shares_have_servers_of_their_own_and_add_up(tmp_path, target, expected):
    made = project(tmp_path, target, {"venv": str(make_venv(tmp_path / "venv"))})
    for index in range(2):
        sampling.run_share("tiny", made.family, made.params, made.paths, Share(index, 2))
    metrics = sampling.run("tiny", made.family, made.params, made.paths, lambda values, step: None, MERGE)
    assert rows_of(made) == expected and metrics["resumed_conversations"] == 20
    logs = sorted(log.name for log in (made.paths.state / "servers").iterdir())
    assert logs == ["sample-share-0-0.log", "sample-share-1-0.log"]


def test_an_interrupt_stops_the_server_and_keeps_the_rows(tmp_path, target, expected, monkeypatch):
    made = project(tmp_path, target, {"venv": str(make_venv(tmp_path / "venv"))})
    append = RowLog.append

    def interrupted(self, row):
        append(self, row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowLog, "append", interrupted)
        made.run(sampling)
    assert not [p for p in psutil.Process().children(recursive=True) if "fake_engine" in " ".join(p.cmdline())]
    assert made.run(sampling)["resumed_conversations"] >= 3
    assert rows_of(made) == expected


def test_a_child_that_keeps_dying_ends_the_stage(tmp_path, target):
    serve = {"venv": str(make_venv(tmp_path / "venv")), "extra_args": ["--die-after", "2"]}
    made = project(tmp_path, target, serve, concurrency=2)
    with pytest.raises(RetryableError, match=r"server 0 was lost 4 times \(it ended by itself with exit code 9"):
        made.run(sampling)
    metrics = project(tmp_path, target, serve | {"extra_args": []})  # other words: other rows, nothing is resumed
    assert metrics.run(sampling)["resumed_conversations"] == 0


def test_a_child_that_dies_at_its_start_says_why(tmp_path, target):
    (tmp_path / "there").touch()
    words = ["--refuse-to-start", str(tmp_path / "there")]
    made = project(tmp_path, target, {"venv": str(make_venv(tmp_path / "venv")), "extra_args": words})
    with pytest.raises(UserError, match="died at its start with exit code 1: RuntimeError: the device is gone"):
        made.run(sampling)


def keeping(root, target, **extra):
    """A project whose servers of a fake vLLM leave states; `extra` are words of theirs."""
    words = [word for name, value in extra.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    made = project(root, target, {"venv": str(make_venv(root / "venv")), "extra_args": words})
    family = made.settings["families"]["tiny"]
    family["sample"]["keep_states"], family["extract"]["engine"] = True, "vllm"
    made.params = parse_params(made.settings)
    return made, vllm.parked_states(made.family, made.facts, made.paths, made.facts.default_aux_layer_ids())


def test_states_of_every_row_are_kept_and_of_no_other_answer(tmp_path):
    folder = make_tiny_target(tmp_path / "t", hidden_size=16, num_hidden_layers=7, chat_template=REWRITING)
    made, parked = keeping(tmp_path, folder, die_after=25, once=tmp_path / "once")
    metrics = made.run(sampling)
    rows = rows_of(made)
    assert any("#" in row["id"] for row in rows) and (tmp_path / "once").exists()
    for row in rows:
        found, _ = parked.get(row["token_ids"])
        assert found["hidden_states"][:, 2, 7].tolist() == row["token_ids"]
    assert metrics["rows_with_states"] == len(rows) == len(list(parked.folder.glob("*.safetensors")))
    assert len(list(parked.folder.iterdir())) == 2 * len(rows) + 1  # with records; the engine's own folder is gone
    assert metrics["recomputed_tokens"] == sum(len(row["token_ids"]) for row in rows)  # this engine caches nothing


def test_a_run_that_goes_on_counts_the_states_of_the_one_before(tmp_path, monkeypatch):
    folder = make_tiny_target(tmp_path / "t", hidden_size=16, num_hidden_layers=7)
    made, parked = keeping(tmp_path, folder)
    append = RowLog.append

    def failing(self, row):
        append(self, row)
        if len(self.rows) == 5:
            raise RetryableError("enough")

    monkeypatch.setattr(RowLog, "append", failing)
    with pytest.raises(RetryableError, match="enough"):
        made.run(sampling)
    monkeypatch.setattr(RowLog, "append", append)
    metrics = made.run(sampling)
    assert metrics["resumed_conversations"] >= 5 and metrics["rows_with_states"] == metrics["rows"] == 20
    assert all(parked.get(row["token_ids"]) for row in rows_of(made))


def test_states_that_the_engine_does_not_write_are_counted_as_missing(tmp_path, caplog, monkeypatch):
    folder = make_tiny_target(tmp_path / "t", hidden_size=16, num_hidden_layers=7)
    made, parked = keeping(tmp_path, folder, lose_states=30)
    monkeypatch.setattr(logging.getLogger("specflow"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="specflow"):
        metrics = made.run(sampling)
    whole = [row for row in rows_of(made) if parked.get(row["token_ids"])]
    assert 0 < metrics["rows_with_states"] == len(whole) < metrics["rows"]
    assert caplog.text.count("extract will ask for them") == metrics["rows"] - len(whole)


@pytest.mark.parametrize("keep", [False, True])
def test_thinking_is_dropped_from_history_as_the_template_says_or_kept(keep):
    tokenizer = make_tiny_tokenizer(chat_template=THINKING)
    turns = Turns(tokenizer, [END], max_new_tokens=60, max_length_tokens=400, keep_thinking=keep)
    messages = [{"role": "user", "content": question} for question in ("a cat", "a dog", "a bird")]
    dialogue = turns.begin(Conversation("c", "x", messages, 0.0, 0))
    first = [*template.encode(tokenizer, "<think>hm</think>red"), END]
    dialogue.tokens = [*dialogue.tokens, *first]
    assert turns.close(dialogue) is None
    history = tokenizer.decode(dialogue.tokens)
    answer = "<think>hm</think>red" if keep else "red"
    assert history == (
        f"<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        "<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dialogue.rewritten is not keep
    for text in ("old", "new"):
        dialogue.tokens = [*dialogue.tokens, *template.encode(tokenizer, text), END]
        done = turns.close(dialogue)
    # without thinking the later answers go on in one row; with it kept, all of them
    assert [row["id"] for row in done["rows"]] == (["c"] if keep else ["c#0", "c#2"])
    assert [len(row["spans"]) for row in done["rows"]] == ([3] if keep else [1, 2])
    for row in done["rows"]:
        for (start, end), turn in zip(row["spans"], row["turns"], strict=True):
            assert tokenizer.decode(row["token_ids"][start:end]) == turn["text"] + "<|im_end|>"
