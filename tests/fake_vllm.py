"""Stands in for the Python of an environment with vLLM: same arguments, same answers over HTTP.

fake_vllm.py -c PROBE                                 ends with 0: vLLM is there
fake_vllm.py -m vllm.entrypoints.cli.main serve ...   serves; --fake-* flags make it misbehave
"""

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

THOUGHT, ANSWER, NUM_TOKENS = "Seventeen times twenty-four.", "408", 12


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--fake-load-seconds", type=float, default=0.0)
    parser.add_argument("--fake-exit", type=int)
    parser.add_argument("--fake-deaf", action="store_true", help="does not end on SIGTERM")
    parser.add_argument("--fake-answer", default=ANSWER)
    parser.add_argument("--fake-pids", help="file for the ids of this process and a child")
    return parser.parse_known_args(sys.argv[3:])[0]


class Handler(BaseHTTPRequestHandler):
    arguments: argparse.Namespace
    ready_at: float

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200 if time.monotonic() >= self.ready_at else 503, {})
        elif self.allowed() and self.path == "/v1/models":
            model = {"id": self.arguments.served_model_name}
            model |= {"max_model_len": self.arguments.max_model_len}
            self.reply(200, {"data": [model]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        assert self.path == "/v1/chat/completions"
        assert request["model"] == self.arguments.served_model_name
        if request.get("max_tokens", 0) >= self.arguments.max_model_len:
            self.reply(400, {"error": "max_tokens cannot be greater than max_model_len"})
            return
        message = {"reasoning": THOUGHT, "content": self.arguments.fake_answer}
        if not self.arguments.fake_answer:
            message["reasoning"] = None
        choice = {"message": message, "finish_reason": "stop"}
        usage = {"completion_tokens": NUM_TOKENS}
        self.reply(200, {"choices": [choice], "usage": usage})

    def allowed(self) -> bool:
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.reply(401, {"error": "Unauthorized"})
            return False
        return True

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    if sys.argv[1] == "-c":
        return
    arguments = parse()
    assert sys.argv[1:3] == ["-m", "vllm.entrypoints.cli.main"], sys.argv
    if arguments.fake_deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if arguments.fake_pids:
        child = os.fork()  # as vLLM's engine; nobody tells it to end
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        with open(arguments.fake_pids, "w") as file:
            file.write(f"{os.getpid()} {child}")
    if arguments.fake_exit is not None:
        time.sleep(arguments.fake_load_seconds)
        sys.exit(arguments.fake_exit)
    if arguments.headless:
        time.sleep(600)
    Handler.arguments = arguments
    Handler.ready_at = time.monotonic() + arguments.fake_load_seconds
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
