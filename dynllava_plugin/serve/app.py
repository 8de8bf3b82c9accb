"""The application and its server: transformers' routes for one model, errors in OpenAI's form, a quiet end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from transformers.cli.serving.server import build_server
from transformers.utils import logging

from dynllava_plugin.errors import UserError
from dynllava_plugin.serve.chat import ChatHandler
from dynllava_plugin.serve.manager import OneModel

KEPT = ("/v1/models", "/health")  # of transformers' routes; the others load models or bypass the policies


def build_app(handler: ChatHandler) -> FastAPI:
    """Return the application: chat completions, the list of models, and health."""
    unused: Any = None
    app = build_server(
        handler.model_manager, handler, unused, unused, unused, unused, handler.generation_state
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in KEPT]

    @app.exception_handler(UserError)
    async def bad_request(_: Request, error: UserError) -> JSONResponse:
        return _error(str(error), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(str(error.detail), error.status_code)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict) -> Response:
        answer = asyncio.ensure_future(handler.handle_request(body, request.state.request_id))
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            answer.cancel()
        gone.cancel()  # a stream listens for itself
        await asyncio.wait({answer, gone})
        if answer.cancelled():
            return _error("the server ends", 503)
        return answer.result()

    return app


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, status: int) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, status_code=status)


class QuietServer(uvicorn.Server):
    """uvicorn's server; says where it listens, and at Ctrl-C lets running answers end first."""

    def __init__(self, config: uvicorn.Config, handler: ChatHandler, about: str) -> None:
        super().__init__(config)
        self.handler, self.about = handler, about

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"serving {self.about} at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Ctrl-C: no answer is waited for."""
        self.handler.batches.leave_all()
        super().handle_exit(sig, frame)


def serve(name: str, model: Any, processor: Any, listener: socket.socket, batch_size: int) -> None:
    """Serve `model` under `name` on a bound socket until it is interrupted, at most `batch_size` requests at a time."""
    logging.set_verbosity_error()
    handler = ChatHandler(OneModel(name, model, processor), batch_size)
    config = uvicorn.Config(
        build_app(handler), log_level="error", access_log=False, timeout_graceful_shutdown=5
    )
    policy = model.model.language_model.policy.name
    QuietServer(config, handler, f"{name} ({policy})").run(sockets=[listener])
