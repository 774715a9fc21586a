"""What stands before the endpoints: the key, the size of bodies and how long they may take, and a count of answers."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from .metrics import Metrics

App = Callable[..., Awaitable[None]]  # ASGI
OPEN = ("/", "/health")  # what needs no key
BODY_SECONDS = 30  # that a body may take to arrive


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: App, api_key: str | None, most: int, error: Callable[..., Any], metrics: Metrics) -> None:
        self._app, self._most, self._error, self._metrics = app, most, error, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal, messages = await self._refusal(scope, receive)
            if refusal is not None:
                return await refusal(scope, receive, counted)

            async def again() -> Any:
                return messages.pop(0) if messages else await receive()

            await self._app(scope, again, counted)
        finally:
            self._metrics.answered(scope["path"], status)

    async def _refusal(self, scope: Any, receive: Any) -> tuple[Any, list[Any]]:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._key):
                return self._error(401, "invalid_api_key", "the API key is missing or wrong"), []
        too_large = self._error(413, "too_large", f"a request may have {self._most} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            return too_large, []
        messages, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    messages.append(await receive())
                    size += len(messages[-1].get("body", b""))
                    if size > self._most:
                        return too_large, []
                    if not messages[-1].get("more_body"):
                        return None, messages
        except TimeoutError:
            return self._error(408, "timeout", f"the request did not arrive within {BODY_SECONDS} s"), []
