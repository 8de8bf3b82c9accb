"""The application and its server: chat completions, the model's name, health; errors in OpenAI's form, a quiet end."""

from __future__ import annotations

import asyncio
import socket
import uuid
import warnings
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging

from dynllava_plugin.errors import UserError
from dynllava_plugin.serve.chat import ChatHandler, error_content

REQUEST_ID = "x-request-id"  # of whoever passes requests on; it comes back in the answer


class BodyLimit:
    """Refuses a body of more than `mib` MiB, unread where its length is told (Starlette's own limit answers in plain text)."""

    def __init__(self, app: ASGIApp, mib: int) -> None:
        self.app, self.mib = app, mib

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told, read = int(dict(scope.get("headers", ())).get(b"content-length", 0)), 0

        async def receive_within() -> Message:
            nonlocal read
            message = {} if told > self.mib << 20 else await receive()
            read += len(message.get("body", b""))
            if max(told, read) > self.mib << 20:
                raise HTTPException(
                    413, f"body: more than {self.mib} MiB; send smaller images, or their URLs"
                )
            return message

        await self.app(scope, receive_within, send)


def build_app(handler: ChatHandler, max_request_mib: int) -> FastAPI:
    """Return the application, which reads requests of that many MiB at most."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(BodyLimit, mib=max_request_mib)
    served = {"id": handler.name, "object": "model", "created": 0, "owned_by": "dynllava"}

    @app.exception_handler(UserError)
    async def bad_request(_: Request, error: UserError) -> JSONResponse:
        return _error(str(error), 400)

    @app.exception_handler(RequestValidationError)
    async def no_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(f"body: {first.get('ctx', {}).get('error') or first['msg']}", 400)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _error(type(error).__name__, 500)  # uvicorn logs the rest

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != handler.name:
            raise HTTPException(404, f"model: {name!r} isn't served here; {handler.name!r} is")
        return served

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict) -> Response:
        request_id = request.headers.get(REQUEST_ID) or str(uuid.uuid4())
        answer = asyncio.ensure_future(handler.handle_request(body, request_id))
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            answer.cancel()
        gone.cancel()  # a stream listens for itself
        await asyncio.wait({answer, gone})
        if answer.cancelled():
            return Response(status_code=499)  # nobody reads it
        response = answer.result()
        response.headers[REQUEST_ID] = request_id
        return response

    return app


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse(error_content(message, status), status_code=status)


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


def serve(handler: ChatHandler, listener: socket.socket, max_request_mib: int) -> None:
    """Serve what `handler` answers on a bound socket until it is interrupted."""
    logging.set_verbosity_error()
    # From 90 megapixels on an image is refused.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    app = build_app(handler, max_request_mib)
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
    policy = handler.model.model.language_model.policy.name
    QuietServer(config, handler, f"{handler.name} ({policy})").run(sockets=[listener])
