"""/v1/responses: OpenAI's newer form of the same, text only, with nothing stored."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .chat import event, joined, measured, usage
from .grammar import JSON_OBJECT
from .metrics import Metrics
from .model import Answer, BadRequest, TextModel
from .schemas import ResponsesRequest

_ROLES = ("user", "assistant", "system", "developer")


async def start(model: TextModel, body: ResponsesRequest) -> "Responding":
    """Queue a request. Raises BadRequest and Busy."""
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    for item in [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input:
        if item.get("type", "message") != "message" or item.get("role") not in _ROLES:
            raise BadRequest("input", f"an item of type {item.get('type')!r} is not supported, only messages")
        content = item.get("content")
        if not isinstance(content, str | list):
            raise BadRequest("input", "a message has no content")
        turns.append({"role": item["role"], "content": content if isinstance(content, str) else joined(content)})
    prompt = await asyncio.to_thread(model.chat_ids, turns)
    most = model.check_prompt(prompt, body.max_output_tokens, ("input", "max_output_tokens"))
    form = body.text.format if body.text else None
    schema = None
    if form is not None and form.type != "text":
        schema = JSON_OBJECT if form.schema_ is None else form.schema_
    options = model.sampling(temperature=body.temperature, top_p=body.top_p)
    return Responding(model, body, (await model.start(prompt, options, most, schema=schema))[0])


class Responding:
    """A request that is being answered."""

    def __init__(self, model: TextModel, body: ResponsesRequest, answer: Answer) -> None:
        self._model, self._body, self._answer = model, body, answer
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created, self._start = int(time.time()), time.monotonic()

    def cancel(self) -> None:
        """Stop generating, if it still goes on."""
        self._answer.cancel()

    async def whole(self, metrics: Metrics) -> dict[str, Any]:
        """The answer at once."""
        text, end = "", ""
        async for piece in measured(self._answer, metrics, self._start):
            text, end = text + piece.text, piece.end
        return self._response(text, end)

    async def events(self, metrics: Metrics) -> AsyncIterator[str]:
        """The answer as it comes."""
        number = -1

        def named(kind: str, **data: Any) -> str:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number} | data, kind)

        at: dict[str, Any] = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield named("response.created", response=self._response(None, ""))
        yield named("response.in_progress", response=self._response(None, ""))
        yield named("response.output_item.added", output_index=0, item=self._message(None))
        yield named("response.content_part.added", part=_part(""), **at)
        text, end = "", ""
        async for piece in measured(self._answer, metrics, self._start):
            text, end = text + piece.text, piece.end
            if piece.text:
                yield named("response.output_text.delta", delta=piece.text, logprobs=[], **at)
        yield named("response.output_text.done", text=text, logprobs=[], **at)
        yield named("response.content_part.done", part=_part(text), **at)
        yield named("response.output_item.done", output_index=0, item=self._message(text))
        kind = "response.completed" if end == "stop" else "response.incomplete"
        yield named(kind, response=self._response(text, end))

    def _message(self, text: str | None) -> dict[str, Any]:
        status, parts = ("in_progress", []) if text is None else ("completed", [_part(text)])
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": parts}

    def _response(self, text: str | None, end: str) -> dict[str, Any]:
        status = "in_progress" if text is None else "completed" if end == "stop" else "incomplete"
        counts = usage([self._answer]) if text is not None else None
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model.name,
            "output": [] if text is None else [self._message(text)],
            "parallel_tool_calls": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": "none",
            "tools": [],
            "metadata": body.metadata or {},
            "usage": counts
            and {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
