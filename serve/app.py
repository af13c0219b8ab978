"""The HTTP side: OpenAI's interface, the chat page, and how much of them each client may use.

GET /                       the page
GET /health                 whether the server answers, and how much it does
GET /v1/models              the one model
POST /v1/chat/completions   an answer
POST /look                  where on the images a word of an answer comes from
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.engine import Engine, Job
from serve.prompts import draw_maps, prepare_job
from serve.requests import ChatRequest, LookRequest, Refusal, read_request

PAGE = Path(__file__).with_name("page.html").read_text()
MAX_BODY, BODY_SECONDS = 32 * 2**20, 60  # a request's bytes, and the time within which they must arrive
TYPES = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


def make_app(service: "Service") -> FastAPI:
    """The application. Every route checks the address first; every error is one line in OpenAI's form."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(service.check_address)])
    for path, answer in (("/", show_page), ("/health", service.health), ("/v1/models", service.models)):
        app.add_api_route(path, answer)
    app.add_api_route("/v1/chat/completions", service.complete, methods=["POST"])
    app.add_api_route("/look", service.look, methods=["POST"])
    app.add_exception_handler(Refusal, lambda _, error: refuse(error))
    app.add_exception_handler(HTTPException, lambda _, error: refuse(Refusal(error.detail, status=error.status_code)))
    app.add_exception_handler(Exception, lambda *_: refuse(Refusal("a fault of the server: see its log", status=500)))
    return app


def refuse(error: Refusal) -> JSONResponse:
    return JSONResponse(describe(error), error.status, {"Retry-After": "1"} if error.status == 429 else {})


def describe(error: Refusal) -> dict:
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def to_event(values: dict) -> str:
    return f"data: {json.dumps(values)}\n\n"


def count_tokens(job: Job) -> dict:
    read, written = len(job.prompt), len(job.ids)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def show_page() -> HTMLResponse:
    """The chat page. A browser loads nothing else for it and runs no script but its own."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1]
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    headers = {"Content-Security-Policy": "; ".join([*rules, "frame-ancestors 'none'"]), "Cache-Control": "no-cache"}
    return HTMLResponse(PAGE, headers=headers | {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises Refusal if it is too large or does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if max(len(body), int(request.headers.get("content-length", 0))) > MAX_BODY:
                    raise Refusal(f"the request is larger than {MAX_BODY:,} bytes", status=413)
    except TimeoutError:
        raise Refusal(f"the request did not arrive within {BODY_SECONDS} seconds", status=408) from None
    except ClientDisconnect:
        raise Refusal("the client left", status=499) from None
    return bytes(body)


class Service:
    """A model behind HTTP.

    Args: name: of the model; queue: requests that may wait for a row of the engine; per_client: open requests of one
    address; hosts: names of this server, beside its numbers.
    """

    def __init__(self, engine: Engine, name: str, queue: int, per_client: int, hosts: set[str]):
        self.engine, self.name, self.hosts, self.created = engine, name, hosts, int(time.time())
        self.most, self.per_client = engine.rows + queue, per_client
        self.open = Counter()  # requests by address
        # Threads that decode images, of which each may take 150 MB, and one that looks.
        self.pools = {ChatRequest: ThreadPoolExecutor(2), LookRequest: ThreadPoolExecutor(1)}
        self.watchers = set()

    async def check_address(self, request: Request):
        """Refuse what a browser sends under another site's name (DNS rebinding) or from another site's page."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            known = name in self.hosts or bool(ipaddress.ip_address(name))  # a number cannot be rebound
        except ValueError:
            known = False
        if not known:
            raise Refusal(f"{host!r:.80} is not a name of this server: --allow-host adds one", status=403)
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal("pages of other sites may not use this server", status=403)

    async def health(self) -> dict:
        engine, vision = self.engine, self.engine.model.config.vision_config is not None
        counts = {"rows": engine.rows, "active": len(engine.active), "waiting": len(engine.waiting)}
        return {"status": "ok", "model": self.name, "vision": vision, **counts, "open": self.open.total()}

    async def models(self) -> dict:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llava-from-scratch"}
        return {"object": "list", "data": [model]}

    async def complete(self, request: Request) -> Response:
        """Answer a dialogue, at once or as the answer is generated."""
        client = self.enter(request)
        try:
            asked, job = await self.work(request, ChatRequest, prepare_job)
        except BaseException:
            self.leave(client)
            raise
        pieces = self.start(job, client)
        watcher = asyncio.create_task(self.watch(request, job))
        self.watchers.add(watcher)  # a task that nothing refers to may be lost
        watcher.add_done_callback(self.watchers.discard)
        answer = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            events = self.stream(answer, job, pieces, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, reason = "", ""
        while not reason:
            piece, reason = await pieces.get()
            text += piece
        if reason not in ("stop", "length"):
            raise Refusal(piece or "the client left", status=500 if piece else 499)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        answer |= {"object": "chat.completion", "choices": [choice], "usage": count_tokens(job)}
        return JSONResponse(answer)

    async def look(self, request: Request) -> dict:
        """Where on the images a word of an answer comes from, see serve.prompts.draw_maps."""
        client = self.enter(request)
        try:
            return (await self.work(request, LookRequest, draw_maps))[1]
        finally:
            self.leave(client)

    def enter(self, request: Request) -> str:
        """Count one open request of a client more; returns its address. Raises Refusal if there are too many."""
        client = request.client.host
        if self.open.total() >= self.most or self.open[client] >= self.per_client:
            raise Refusal(f"busy: {self.most} requests in all and {self.per_client} of a client are taken", status=429)
        self.open[client] += 1
        return client

    def leave(self, client: str):
        """Count one open request of a client less."""
        self.open[client] -= 1
        self.open += Counter()  # drops the zeros

    async def work(self, request: Request, kind: type, function: Callable) -> tuple:
        """Read a request and call a function of serve.prompts with it, in a thread; returns both."""
        body, engine = await read_body(request), self.engine

        def call():
            asked = read_request(body, kind, self.name)
            return asked, function(asked, engine)

        return await asyncio.get_running_loop().run_in_executor(self.pools[kind], call)

    def start(self, job: Job, client: str) -> asyncio.Queue:
        """Hand a job to the engine; returns the queue that its pieces and reasons will arrive in."""
        pieces, loop = asyncio.Queue(), asyncio.get_running_loop()

        def receive(piece: str, reason: str):
            if reason:
                self.leave(client)
            pieces.put_nowait((piece, reason))

        def send(piece: str, reason: str):  # on the engine's thread
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(receive, piece, reason)

        job.send = send
        self.engine.submit(job)
        return pieces

    async def watch(self, request: Request, job: Job):
        """Cancel a job when its client has left."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(job)

    async def stream(self, answer: dict, job: Job, pieces: asyncio.Queue, usage: bool) -> AsyncIterator[str]:
        """The events of an answer."""
        answer |= {"object": "chat.completion.chunk"} | ({"usage": None} if usage else {})
        delta, reason = {"role": "assistant", "content": ""}, ""
        while not reason:
            yield to_event(answer | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            piece, reason = await pieces.get()
            delta = {"content": piece}
        if reason == "error":
            yield to_event(describe(Refusal(piece, status=500)))
            return
        yield to_event(answer | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
        if usage:
            yield to_event(answer | {"choices": [], "usage": count_tokens(job)})
        yield "data: [DONE]\n\n"
