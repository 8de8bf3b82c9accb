"""A small OpenAI-compatible judge on this machine, which answers as it is told: well, wrongly, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the judge says to a question: its text, or one of the ways in which a judge fails.
FAILS, HANGS, NO_JSON = "<500>", "<no answer>", "<no JSON>"
_PROBE = ("Hi", "hello")  # what asks whether anybody is there


@dataclass
class JudgeServer:
    """One that runs.

    Attributes
    ----------
    url : str
        For ``OPENAI_API_URL``.
    asked : list of str
        The questions, in their order; those that only ask whether it is there are left out.
    answer : str or callable
        As `judge_server`'s.
    """

    url: str
    answer: str | Callable[[str], str]
    asked: list[str] = field(default_factory=list)

    def answers(self, answer: str | Callable[[str], str]) -> None:
        """Answer so from now on, and forget what was asked."""
        self.answer = answer
        self.asked.clear()


@contextmanager
def judge_server(answer: str | Callable[[str], str], hang: float = 60) -> Iterator[JudgeServer]:
    """Serve until the block ends.

    Parameters
    ----------
    answer : str or callable
        To every question, or of a question; `FAILS`, `HANGS` and `NO_JSON` are failures.
    hang : float
        Seconds for which `HANGS` keeps a client waiting.
    """
    left = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = _text(body["messages"][-1]["content"])
            if question in _PROBE:
                return self._send(200, _completion(body["model"], "Hi"))
            server.asked.append(question)
            said = server.answer if isinstance(server.answer, str) else server.answer(question)
            if said == HANGS:
                left.wait(hang)
                self.close_connection = True
            elif said == FAILS:
                self._send(500, b'{"error": {"message": "out of order"}}')
            elif said == NO_JSON:
                self._send(200, b"<html>busy</html>")
            else:
                self._send(200, _completion(body["model"], said))

        def _send(self, code: int, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = JudgeServer(f"http://127.0.0.1:{http.server_address[1]}/v1", answer)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        left.set()
        http.shutdown()
        http.server_close()


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _completion(model: str, text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    facts = {"id": "1", "object": "chat.completion", "created": int(time.time()), "model": model}
    return json.dumps({**facts, "choices": [choice], "usage": usage}).encode()
