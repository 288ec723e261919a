"""An inference server as far as starting one goes: `fake_server.py PORT MODEL MODE`, standard library only."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

PORT, MODEL, MODE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if MODE == "boom":
    sys.stdout.write("loading\n")
    raise RuntimeError("the weights are   not there")
if MODE == "oom":
    sys.stdout.write("ValueError: No available memory for the cache blocks. Try increasing it.\n")
    sys.exit(1)
if MODE == "child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # grandchild"])


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if MODE == "key" and self.headers.get("Authorization") != "Bearer sesame":
            self.answer(401, {})
        elif self.path == "/health":
            self.answer(200, {})
        elif MODE == "html":
            self.answer(200, "hello")
        else:
            self.answer(200, {"data": [{"id": MODEL, "max_model_len": 512}]})

    def do_POST(self) -> None:
        if MODE == "hung":
            time.sleep(600)
        self.answer(500 if MODE == "broken" else 200, {"choices": [{"text": "a"}]})


HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
