"""/v1/chat/completions: turns in, an answer or calls of tools out."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ..decode.sampling import Sampling, Token
from .grammar import JSON_OBJECT
from .metrics import Metrics
from .model import Answer, BadRequest, Piece, TextModel, parse_tool_calls
from .schemas import ChatRequest, ResponseFormat, Sampled

TOOL_MARKS = ("<tool_call>", "<|python_tag|>")


def event(data: dict[str, Any] | str, name: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


def sampling(model: TextModel, body: Sampled, logprobs: int) -> Sampling:
    """The options of a request. Raises BadRequest for biases of tokens that there are not."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise BadRequest("logit_bias", "its keys must be numbers of tokens") from None
    if wrong := [token for token in bias if not 0 <= token < model.vocabulary]:
        raise BadRequest("logit_bias", f"there is no token {wrong[0]}")
    return model.sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=bias,
        seed=body.seed,
        logprobs=logprobs,
    )


def schema_of(form: ResponseFormat | None) -> Any:
    """What an answer must follow, None for any text."""
    if form is None or form.type == "text":
        return None
    return JSON_OBJECT if form.json_schema is None else form.json_schema.schema_


async def start(model: TextModel, body: ChatRequest) -> "Chat":
    """Queue a request. Raises BadRequest and Busy."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if body.tool_choice != "none" else []
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = joined(message["content"])
    prompt = await asyncio.to_thread(model.chat_ids, messages, tools or None, **body.chat_template_kwargs or {})
    limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    most = model.check_prompt(prompt, getattr(body, limit), ("messages", limit))
    options = sampling(model, body, (body.top_logprobs or 0) if body.logprobs else -1)
    schema = schema_of(body.response_format)
    forced = body.tool_choice not in (None, "none", "auto")
    if forced:
        schema = _call_schema(body)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    marks = TOOL_MARKS if tools and not forced else ()
    answers = await model.start(
        prompt, options, most, count=body.n, stops=stops, marks=marks, schema=schema, ignore_end=body.ignore_eos
    )
    return Chat(model, body, answers, forced, bool(tools))


def joined(parts: list[dict[str, Any]]) -> str:
    for part in parts:
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise BadRequest("messages", f"content of type {part.get('type')!r} is not supported, only text")
    return "".join(part["text"] for part in parts)


def _call_schema(body: ChatRequest) -> dict[str, Any]:
    wanted = None if isinstance(body.tool_choice, str) or body.tool_choice is None else body.tool_choice.function.name
    tools = [tool.function for tool in body.tools or [] if wanted in (None, tool.function.name)]
    if not tools:
        raise BadRequest("tool_choice", f"there is no tool {wanted!r}")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class Chat:
    """A request that is being answered."""

    def __init__(self, model: TextModel, body: ChatRequest, answers: list[Answer], forced: bool, tools: bool) -> None:
        self._model, self._body, self._answers, self._forced, self._tools = model, body, answers, forced, tools
        self._id, self._created, self._start = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), time.monotonic()

    def cancel(self) -> None:
        """Stop generating, if it still goes on."""
        for answer in self._answers:
            answer.cancel()

    async def whole(self, metrics: Metrics) -> dict[str, Any]:
        """The answer at once."""
        choices = await asyncio.gather(*(self._choice(i, answer, metrics) for i, answer in enumerate(self._answers)))
        return self._frame("chat.completion") | {"choices": choices, "usage": usage(self._answers)}

    async def _choice(self, index: int, answer: Answer, metrics: Metrics) -> dict[str, Any]:
        text, reasoning, tokens, end = "", "", [], ""
        async for piece in measured(answer, metrics, self._start):
            text, reasoning, end = text + piece.text, reasoning + piece.reasoning, piece.end
            tokens += piece.tokens
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = parse_tool_calls(text) if self._tools and (end == "stop" or not self._forced) else []
        if calls:
            message |= {"content": None, "tool_calls": _tool_calls(calls)}
            end = "tool_calls"
        if reasoning:
            message["reasoning_content"] = reasoning
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": end}

    async def events(self, metrics: Metrics) -> AsyncIterator[str]:
        """The answer as it comes."""
        usage_wanted = self._body.stream_options is not None and self._body.stream_options.include_usage
        rest: dict[str, Any] = {"usage": None} if usage_wanted else {}
        frame, held = self._frame("chat.completion.chunk"), [""] * len(self._answers)

        def chunk(index: int, delta: dict[str, Any], end: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
            return event(frame | {"choices": [choice]} | rest)

        for index in range(len(self._answers)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in together(self._answers, metrics, self._start):
            delta: dict[str, Any] = {}
            text = held[index] + piece.text
            # what may be a call of a tool is known as one only when it is whole
            hold = self._tools and (self._forced or text.lstrip().startswith(("{", "[", *TOOL_MARKS)))
            held[index], text = (text, "") if hold and not piece.end else ("", text)
            end: str | None = piece.end or None
            if end and hold and (calls := parse_tool_calls(text)):
                delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(_tool_calls(calls))]
                end, text = "tool_calls", ""
            if text:
                delta["content"] = text
            if piece.reasoning:
                delta["reasoning_content"] = piece.reasoning
            if delta or end:
                yield chunk(index, delta, end, self._logprobs(piece.tokens))
        if usage_wanted:
            yield event(frame | {"choices": [], "usage": usage(self._answers)})
        yield event("[DONE]")

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _logprobs(self, tokens: list[Token]) -> Any:
        if not self._body.logprobs:
            return None

        def named(token: int, logprob: float) -> dict[str, Any]:
            text = self._model.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        found = [named(t.id, t.logprob) | {"top_logprobs": [named(*top) for top in t.top]} for t in tokens]
        return {"content": found, "refusal": None}


def _tool_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call} for call in calls]


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Tokens in and out; answers share a prompt."""
    requests = [answer.request for answer in answers]
    prompt, generated = len(requests[0].prompt), sum(request.generated for request in requests)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
    return found | {"prompt_tokens_details": {"cached_tokens": requests[0].cached}}


async def measured(answer: Answer, metrics: Metrics, start: float) -> AsyncIterator[Piece]:
    """An answer's pieces, counted; a sequence that nobody reads further is stopped."""
    first, last = True, start
    pieces = answer.pieces()
    try:
        async for piece in pieces:
            now = time.monotonic()
            if first:
                metrics.first.observe(now - start)
            elif piece.tokens:
                metrics.each.observe((now - last) / len(piece.tokens))
            first, last = False, now
            yield piece
    finally:
        await pieces.aclose()
        request = answer.request
        metrics.prompt.inc(len(request.prompt))
        metrics.reused.inc(request.cached)
        metrics.generated.inc(request.generated)


async def together(answers: list[Answer], metrics: Metrics, start: float) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its answer's number."""
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for piece in measured(answer, metrics, start):
                queue.put_nowait((index, piece))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(read(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= bool(piece.end)
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
