"""The server: OpenAI's API over one checkpoint, its metrics, and a page to chat with it. ASGI, for uvicorn."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..decode.batch import Busy
from . import chat, completions, responses
from .embed import Encoder
from .gate import Gate
from .metrics import Metrics
from .model import BadRequest, Cancelled, TextModel
from .schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ResponsesRequest,
    TokenizeRequest,
)

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Limits:
    """What a server takes on. seconds: for one answer; body: bytes of a request; drain: seconds to finish on
    SIGTERM."""

    seconds: float = 600
    body: int = 4 << 20
    drain: float = 30


class Server:
    """What the endpoints share."""

    def __init__(self, name: str, model: TextModel | None, encoder: Encoder | None, limits: Limits) -> None:
        self.name, self.model, self.encoder, self.limits = name, model, encoder, limits
        self.metrics, self.created = Metrics(), int(time.time())

    def text_model(self, asked: str | None) -> TextModel:
        """The model, if it is the one that a request asks for."""
        self.check_name(asked)
        if self.model is None:
            raise BadRequest("model", f"{self.name} makes embeddings; it does not generate text", "model_not_supported")
        return self.model

    def check_name(self, asked: str | None) -> None:
        """The `model` of a request never loads anything."""
        if asked not in (None, self.name):
            raise HTTPException(404, f"there is no model {asked!r} here, only {self.name!r}")

    async def answer(
        self, request: Request, work: Awaitable[dict[str, Any]], cancel: Callable[[], None] = lambda: None
    ) -> Response:
        """A whole answer; the work stops when its client goes away or its time is over."""
        task = asyncio.ensure_future(work)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, watch}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return JSONResponse(await task)
            if watch.done():
                return Response(status_code=499)
            return error(504, "timeout", f"the answer took more than {self.limits.seconds:g} s")
        finally:
            cancel()
            for each in (task, watch):
                each.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    def stream(self, work: Any) -> Response:
        """An answer as server-sent events; what goes wrong meanwhile becomes one, too."""

        async def guarded() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    async for event in work.events(self.metrics):
                        yield event
            except TimeoutError:
                yield chat.event({"error": content("timeout", f"the answer took more than {self.limits.seconds:g} s")})
            except Cancelled as stopped:
                yield chat.event({"error": content("cancelled", str(stopped))})
            except Exception as failed:
                self.metrics.failures.inc()
                yield chat.event({"error": content("internal_error", f"{type(failed).__name__}: {failed}")})
            finally:
                work.cancel()

        return StreamingResponse(guarded(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def content(code: str, message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's clients know it."""
    return {"message": message, "type": kind, "param": param, "code": code}


def error(status: int, code: str, message: str, param: str | None = None, **headers: str) -> JSONResponse:
    """The same as an answer."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": content(code, message, param, kind)}, status, headers)


def create_app(server: Server, api_key: str | None = None) -> Callable[..., Awaitable[None]]:
    """The application. api_key: what every request but /health and the page must bring as a bearer token."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        if server.model is not None:
            await asyncio.to_thread(server.model.scheduler.drain, server.limits.drain)

    app = FastAPI(title="bitnet", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    _errors(app, server)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = server.model.scheduler.counts() if server.model else (0, 0)
        return {"status": "ok", "model": server.name, "running": running, "waiting": waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        counts = server.model.scheduler.counts() if server.model else (0, 0)
        return Response(server.metrics.text(*counts), media_type=server.metrics.media_type)

    def card() -> dict[str, Any]:
        found: dict[str, Any] = {"id": server.name, "object": "model", "created": server.created, "owned_by": "local"}
        if server.model is not None:
            found |= {
                "context": server.model.scheduler.context,
                "chat": server.model.chats,
                "engine": server.model.engine,
            }
        return found

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        server.check_name(name)
        return card()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        work = await chat.start(server.text_model(body.model), body)
        if body.stream:
            return server.stream(work)
        return await server.answer(request, work.whole(server.metrics), work.cancel)

    @app.post("/v1/completions")
    async def plain_completions(body: CompletionRequest, request: Request) -> Response:
        work = await completions.start(server.text_model(body.model), body)
        if body.stream:
            return server.stream(work)
        return await server.answer(request, work.whole(server.metrics), work.cancel)

    @app.post("/v1/responses")
    async def make_response(body: ResponsesRequest, request: Request) -> Response:
        work = await responses.start(server.text_model(body.model), body)
        if body.stream:
            return server.stream(work)
        return await server.answer(request, work.whole(server.metrics), work.cancel)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        server.check_name(body.model)
        if server.encoder is None:
            raise BadRequest("model", f"{server.name} generates text; it makes no embeddings", "model_not_supported")
        return await server.answer(request, _embed(server.encoder, server.name, body))

    def tokenizer() -> Any:
        return server.model.tokenizer if server.model else server.encoder.tokenizer  # type: ignore[union-attr]

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        server.check_name(body.model)
        if body.messages is not None:
            ids = server.text_model(body.model).chat_ids([m.model_dump(exclude_none=True) for m in body.messages])
        else:
            ids = tokenizer()(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"]
        return {"tokens": list(ids), "count": len(ids)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        server.check_name(body.model)
        if wrong := [token for token in body.tokens if not 0 <= token < len(tokenizer())]:
            raise BadRequest("tokens", f"there is no token {wrong[0]}")
        return {"prompt": tokenizer().decode(body.tokens)}

    return Gate(app, api_key, server.limits.body, error, server.metrics)


_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def _errors(app: FastAPI, server: Server) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, found: RequestValidationError) -> Response:
        first = found.errors()[0]
        parts = [str(part) for part in first["loc"] if part != "body"]
        path = ".".join(parts + [field for field in [first.get("ctx", {}).get("field")] if field])
        if first["type"] == "json_invalid":
            return error(
                400, "invalid_json", f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
            )
        if first["type"] == "extra_forbidden":
            return error(400, "unsupported_field", f"{path} is not supported here", path)
        words = first["msg"].removeprefix("Value error, ")
        return error(400, "invalid_value", f"{path or 'the body'}: {words}", path or None)

    @app.exception_handler(BadRequest)
    async def refused(request: Request, found: BadRequest) -> Response:
        return error(400, found.code, str(found), found.field)

    @app.exception_handler(Busy)
    async def busy(request: Request, found: Busy) -> Response:
        return error(503, "busy", str(found), **{"Retry-After": "5"})

    @app.exception_handler(Cancelled)
    async def cancelled(request: Request, found: Cancelled) -> Response:
        return error(503, "cancelled", str(found), **{"Retry-After": "5"})

    @app.exception_handler(HTTPException)
    async def http(request: Request, found: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(found.status_code, "error")
        if found.status_code == 404 and str(found.detail).startswith("there is no model"):
            code = "model_not_found"
        return error(found.status_code, code, str(found.detail))

    @app.exception_handler(Exception)
    async def failed(request: Request, found: Exception) -> Response:
        server.metrics.failures.inc()
        return error(500, "internal_error", f"{type(found).__name__}: {found}")


async def _embed(encoder: Encoder, name: str, body: EmbeddingsRequest) -> dict[str, Any]:
    texts = [body.input] if isinstance(body.input, str) else body.input
    if any(not text for text in texts):
        raise BadRequest("input", "a text is empty")
    vectors = await asyncio.to_thread(lambda: encoder(texts).numpy())
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise BadRequest("dimensions", f"the vectors have {vectors.shape[1]} dimensions")
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    used = sum(len(ids) for ids in encoder.tokenizer(texts, truncation=True, max_length=encoder.length)["input_ids"])

    def coded(vector: Any) -> Any:
        if body.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": coded(vector)} for i, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": used, "total_tokens": used}}
