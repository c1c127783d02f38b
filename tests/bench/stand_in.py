"""A stand-in for a server's OpenAI endpoint: streams, counts as SGLang does, and can die in the middle of a stream."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTOGRAM = [1, 0, 2]
"""of every answer: three verify steps, four correct drafts"""
WORDS = ["one", " two", " three"]


class StandIn(ThreadingHTTPServer):
    """Every answer is WORDS, two tokens a word. asked: bodies of the requests, in order.

    dies_at: the request (from 1) in whose stream the server goes away. interrupts_at: the one at which it presses
    Ctrl-C. has_counters: whether it speculates. refuses: prompts it answers with status 400.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.dies_at = 0
        self.interrupts_at = 0
        self.has_counters = True
        self.refuses: set[str] = set()
        self.is_dead = False
        self.flushes = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def last_turns(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.is_dead:
            self._hang_up()
        elif self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})
        else:
            self._json({"version": "0.0", "speculative_num_steps": 2, "secret": "x"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or "{}")
        if self.server.is_dead:
            return self._hang_up()
        if self.path == "/flush_cache":
            self.server.flushes += 1
            return self._json({})
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
        if body["messages"][-1]["content"] in self.server.refuses:
            return self._json({"error": {"message": "too long"}}, status=400)
        if number == self.server.interrupts_at:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(5)
        if body.get("stream"):
            return self._stream(dies=number == self.server.dies_at)
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
        return self._json(self._reply([choice], _usage(6)) | self._counters())

    def _stream(self, dies: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for place, word in enumerate(WORDS):
            self._event(self._reply([_delta({"content": word}, None)], _usage(2 * (place + 1))))
            if dies:
                self.server.is_dead = True
                return self._hang_up()
        self._event(self._reply([_delta({}, "stop")], None))
        if self.server.has_counters:
            self._event(self._reply([], None) | self._counters())
        self._event(self._reply([], _usage(6)))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _reply(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        return {"id": "x", "object": "chat", "created": 0, "model": "stand-in", "choices": choices, "usage": usage}

    def _counters(self) -> dict[str, Any]:
        steps, correct = sum(HISTOGRAM), sum(j * count for j, count in enumerate(HISTOGRAM))
        told = {
            "spec_verify_ct": steps,
            "spec_num_correct_drafts": correct,
            "spec_correct_drafts_histogram": HISTOGRAM,
        }
        return {"sglext": {"spec_tokens_details": told}} if self.server.has_counters else {}

    def _event(self, content: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(content)}\n\n".encode())

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _json(self, content: dict[str, Any], status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def _hang_up(self) -> None:
        self.close_connection = True


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}


def _delta(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
