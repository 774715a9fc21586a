"""What stands before transformers' server: who asks for another model, or for a chat without a template, is told so,
nothing but the served checkpoint is ever loaded, and what a client asked for stops when it goes away."""

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import torch
from fastapi import HTTPException
from starlette.middleware import Middleware
from transformers import StoppingCriteriaList
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import BaseGenerateManager, GenerateManager

App = Callable[..., Awaitable[None]]  # ASGI


class Server(Serve):
    """transformers' `serve` command behind this door; give it --non-blocking, which makes it call start_server."""

    __doc__ = Serve.__doc__

    def start_server(self) -> None:
        """Run the server until it is stopped."""
        manager, state, app = self._model_manager, self._generation_state, self.server.config.app
        served = manager.process_model_name(manager.force_model)
        _, processor = manager.load_model_and_processor(served)  # the one that is loaded already
        manager.load_model_and_processor = partial(_only, manager.load_model_and_processor, served)
        state.get_manager = partial(_stoppable, state.get_manager)
        defaults = self._chat_handler.chat_template_kwargs
        chat = bool(getattr(processor, "chat_template", None) or defaults.get("chat_template"))
        if not chat:
            print(f"note: {_no_template(manager.force_model)}", file=sys.stderr)
        app.user_middleware.append(Middleware(Checks, model=manager.force_model, chat=chat))  # innermost: within CORS
        self.server.config.app = Hangups(app)
        self.server.run()


class Checks:
    """Answers the list of models, and refuses what is not for the served one."""

    def __init__(self, app: App, model: str, chat: bool) -> None:
        self.app, self.model, self.chat = app, model, chat

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "POST"):
            return await self.app(scope, receive, send)
        if scope["method"] == "GET":
            if scope["path"] != "/v1/models":
                return await self.app(scope, receive, send)
            model = {"id": self.model, "object": "model", "created": 0, "owned_by": "local"}
            return await _reply(send, 200, {"object": "list", "data": [model]})
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        found = self._refusal(scope["path"], b"".join(message.get("body", b"") for message in messages))
        if found:
            status, code, message = found
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            return await _reply(send, status, {"error": error})

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)

    def _refusal(self, path: str, body: bytes) -> tuple[int, str, str] | None:
        """Status, code and reason; None for what may pass, also for what the server itself refuses."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(request, dict):
            return None
        if request.get("model") not in (None, self.model):
            return 404, "model_not_found", f"there is no model {request['model']!r} here, only {self.model!r}"
        options = request.get("chat_template_kwargs")
        template = self.chat or (isinstance(options, dict) and options.get("chat_template"))
        if path in ("/v1/chat/completions", "/v1/responses") and not template:
            return 400, "no_chat_template", _no_template(self.model)
        return None


class Hangups:
    """Cancels the work on a request when its client has gone."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        arrived: asyncio.Queue[Any] = asyncio.Queue()

        async def listen() -> None:
            message = await receive()
            while message["type"] != "http.disconnect":
                arrived.put_nowait(message)
                message = await receive()
            arrived.put_nowait(message)

        gone = asyncio.ensure_future(listen())
        work = asyncio.ensure_future(self.app(scope, arrived.get, send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work  # raises what it raised
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)


def _no_template(model: str) -> str:
    return f"{model} has no chat template; use /v1/completions, which continues plain text, or add chat_template.jinja"


async def _reply(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _only(load: Callable[..., Any], served: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """ModelManager.load_model_and_processor, which a request reaches by other ways, too (a form's field, say)."""
    if name != served:
        raise HTTPException(404, f"there is no model {name!r} here, only {served!r}")
    return load(name, *args, **kwargs)


def _stoppable(get_manager: Callable[..., BaseGenerateManager], *args: Any, **kwargs: Any) -> BaseGenerateManager:
    """GenerationState.get_manager; what is not streamed stops with its request, too, as what is streamed does."""
    manager = get_manager(*args, **kwargs)
    if "generate_non_streaming" not in vars(manager):
        manager.generate_non_streaming = partial(_generate, manager, manager.generate_non_streaming)
    return manager


async def _generate(
    manager: BaseGenerateManager, generate: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
) -> Any:
    if not isinstance(manager, GenerateManager):  # continuous batching
        try:
            return await generate(model, processor, inputs, config, request_id=request_id)
        except asyncio.CancelledError:
            manager._cb.cancel_request(request_id)
            raise
    stopped = threading.Event()

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), stopped.is_set(), device=ids.device)

    inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([stop])}
    # its thread hands its result over in any case, to a future that must be there to take it
    work = asyncio.ensure_future(generate(model, processor, inputs, config, request_id=request_id))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stopped.set()
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        raise
