"""The routes of the API over one engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from experiments.serving.asked import Asked, Reader
from experiments.serving.engine import Engine, Event, Failed, Job, Scored
from experiments.serving.refusal import Refused
from experiments.serving.replies import Reply, Token

BODY = 4 * 2**20  # bytes of a request
GONE = 499  # the client has left: nobody reads the status

Events = asyncio.Queue[tuple[int, Event | None]]


class Api:
    """The handlers. `created`: when the model was loaded (seconds since 1970); `limit`: bytes of a body."""

    def __init__(self, engine: Engine, reader: Reader, created: int, limit: int = BODY) -> None:
        self.engine, self.reader, self.created, self.limit = engine, reader, created, limit

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: Any = {Refused: _refused, HTTPException: _elsewhere, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting})

    def _card(self) -> dict[str, Any]:
        return {"id": self.reader.name, "object": "model", "created": self.created, "owned_by": "decoder-lab"}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.reader.name:
            valid = self.reader.name
            raise Refused(f"model: unknown name {name!r}; valid: {valid}", status=404, code="model_not_found")
        return JSONResponse(self._card())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.text)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > self.limit:
                raise Refused(f"the body is too large; valid: at most {self.limit} bytes", status=413, code="too_large")
        return body

    async def _answer(self, request: Request, read: Callable[[bytes], Asked]) -> Response:
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        asked = await asyncio.to_thread(read, body)  # templates are rendered by another process
        events: Events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(i: int) -> Callable[[Event], None]:
            def send(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(events.put_nowait, (i, event))

            return send

        jobs = [Job(row, tell(i), asked.stops, asked.top or 0, asked.scored) for i, row in enumerate(asked.rows)]
        self.engine.submit(jobs)
        reply = Reply(asked, self.reader.name, self.reader.model.tokenizer)
        if asked.stream:
            left = BackgroundTask(_cancel, jobs)  # a stream that nobody has begun to read does not end by itself
            return StreamingResponse(_stream(reply, jobs, events), media_type="text/event-stream", background=left)
        watch = asyncio.create_task(_left(request, events))
        try:
            for _ in reply.begin():
                pass
            while not reply.finished:
                i, event = await events.get()
                if event is None:
                    return Response(status_code=GONE)
                if isinstance(event, Failed):
                    raise Refused(event.why, status=event.status, code="failed")
                await _added(reply, i, event)
            return JSONResponse(reply.whole())
        finally:
            watch.cancel()
            _cancel(jobs)


async def _added(reply: Reply, i: int, event: Event) -> tuple[int, str, list[Token]]:
    """A long prompt takes a while to spell; others are served meanwhile."""
    return await asyncio.to_thread(reply.add, i, event) if isinstance(event, Scored) else reply.add(i, event)


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancelled.set()


async def _left(request: Request, events: Events) -> None:
    """Says so when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait((0, None))


async def _stream(reply: Reply, jobs: list[Job], events: Events) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
        for begun in reply.begin():
            yield _sent(reply.piece(*begun, first=True))
        while not reply.finished:
            i, event = await events.get()
            if isinstance(event, Failed):
                yield _sent(Refused(event.why, status=event.status, code="failed").body())
                return
            assert event is not None
            new = await _added(reply, i, event)
            if new[1] or new[2] or reply.choices[i].finish:
                yield _sent(reply.piece(*new))
        if reply.asked.usage:
            yield _sent(reply.last())
        yield "data: [DONE]\n\n"
    finally:
        _cancel(jobs)


def _sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _refused(request: Request, error: Refused) -> Response:
    return JSONResponse(error.body(), error.status)


async def _elsewhere(request: Request, error: HTTPException) -> Response:
    words = f"{request.method} {request.url.path}: {error.detail.lower()}; valid: GET /v1/models, POST /v1/completions"
    return JSONResponse(
        Refused(f"{words}, POST /v1/chat/completions", status=error.status_code, code="no_such_route").body(),
        error.status_code,
    )


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse(Refused(f"the server failed: {type(error).__name__}", status=500, code="failed").body(), 500)
