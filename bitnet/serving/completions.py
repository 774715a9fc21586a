"""/v1/completions: plain text, continued."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ..decode.sampling import Token
from .chat import event, measured, sampling, schema_of, together
from .metrics import Metrics
from .model import Answer, TextModel
from .schemas import CompletionRequest


async def start(model: TextModel, body: CompletionRequest) -> "Completion":
    """Queue a request. Raises BadRequest and Busy."""
    given: Any = body.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = [
        p if isinstance(p, list) else await asyncio.to_thread(model.plain_ids, p)
        for p in (given if several else [given])
    ]
    limit = 16 if body.max_tokens is None else body.max_tokens  # as OpenAI has it
    options = sampling(model, body, -1 if body.logprobs is None else body.logprobs)
    most = [model.check_prompt(prompt, limit) for prompt in prompts]
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    answers = []
    try:
        for prompt, tokens in zip(prompts, most, strict=True):
            answers += await model.start(
                prompt,
                options,
                tokens,
                count=body.n,
                stops=stops,
                schema=schema_of(body.response_format),
                ignore_end=body.ignore_eos,
            )
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return Completion(model, body, answers)


class Completion:
    """A request that is being answered."""

    def __init__(self, model: TextModel, body: CompletionRequest, answers: list[Answer]) -> None:
        self._model, self._body, self._answers = model, body, answers
        self._id, self._created, self._start = f"cmpl-{uuid.uuid4().hex}", int(time.time()), time.monotonic()

    def cancel(self) -> None:
        """Stop generating, if it still goes on."""
        for answer in self._answers:
            answer.cancel()

    async def whole(self, metrics: Metrics) -> dict[str, Any]:
        """The answer at once."""
        choices = await asyncio.gather(*(self._choice(i, answer, metrics) for i, answer in enumerate(self._answers)))
        return self._frame() | {"choices": choices, "usage": self._usage()}

    async def _choice(self, index: int, answer: Answer, metrics: Metrics) -> dict[str, Any]:
        text, tokens, end = self._echo(answer), [], ""
        async for piece in measured(answer, metrics, self._start):
            text, end = text + piece.text + piece.reasoning, piece.end
            tokens += piece.tokens
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": end}

    async def events(self, metrics: Metrics) -> AsyncIterator[str]:
        """The answer as it comes."""
        usage_wanted = self._body.stream_options is not None and self._body.stream_options.include_usage
        rest: dict[str, Any] = {"usage": None} if usage_wanted else {}
        begun: set[int] = set()
        async for index, piece in together(self._answers, metrics, self._start):
            text = piece.text + piece.reasoning
            if index not in begun:
                begun.add(index)
                text = self._echo(self._answers[index]) + text
            choice = {"index": index, "text": text, "logprobs": self._logprobs(piece.tokens)}
            yield event(self._frame() | {"choices": [choice | {"finish_reason": piece.end or None}]} | rest)
        if usage_wanted:
            yield event(self._frame() | {"choices": [], "usage": self._usage()})
        yield event("[DONE]")

    def _frame(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model.name}

    def _echo(self, answer: Answer) -> str:
        if not self._body.echo:
            return ""
        text: str = self._model.tokenizer.decode(answer.request.prompt, skip_special_tokens=True)
        return text

    def _usage(self) -> dict[str, Any]:
        requests = [answer.request for answer in self._answers]
        prompt = sum(len(request.prompt) for request in requests[:: self._body.n])
        generated = sum(request.generated for request in requests)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _logprobs(self, tokens: list[Token]) -> Any:
        if self._body.logprobs is None:
            return None
        decode = self._model.tokenizer.decode
        return {
            "tokens": [decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{decode([top]): value for top, value in token.top} for token in tokens],
        }
