"""A checkpoint that generates for many at once: its tokenizer, its scheduler, and one asynchronous stream a
sequence."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..decode.attach import CACHE
from ..decode.batch import Request, Scheduler
from ..decode.captured import RoomSequences
from ..decode.eager import EagerSequences
from ..decode.native import NativeSequences
from ..decode.pieces import Unplanned
from ..decode.rooms import Unfit
from ..decode.sampling import Grammar, Sampler, Sampling, Token
from ..decode.sequences import Sequences
from .text import TextStream


class BadRequest(Exception):
    """What a client asked for that cannot be: the field, and why."""

    def __init__(self, field: str, why: str, code: str = "invalid_value") -> None:
        super().__init__(why)
        self.field, self.code = field, code


@dataclass
class Piece:
    """A part of an answer: text that is certain by now, and the tokens since the piece before."""

    text: str = ""
    reasoning: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: str = ""  # why the answer ends: "stop" or "length"


def sequences_of(model: Any, slots: int, context: int | None = None) -> tuple[Sequences, str]:
    """What decodes a model, the native step or a CUDA graph if it can, and its name, with the reason if it cannot."""
    if model.device.type == "cuda":
        try:
            rooms = RoomSequences(model, CACHE, slots, context)
        except Unfit as why:
            return EagerSequences(model, slots, context), f"transformers ({why})"
        return rooms, "CUDA graph" if rooms.is_captured else "transformers, in one step for all"
    try:
        return NativeSequences(model, slots, context=context), "native"
    except Unplanned as why:
        return EagerSequences(model, slots, context), f"transformers ({why})"


class TextModel:
    """A causal language model and its tokenizer behind a scheduler.

    model:   transformers' class, packed or not
    name:    as clients know it
    slots:   sequences at a time; queue: that may wait
    context: tokens of a sequence, at most the model's
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, slots: int = 8, queue: int = 64, context: int | None = None
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        config = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        sequences, self.engine = sequences_of(model, slots, context)
        self.scheduler = Scheduler(sequences, queue)
        ends = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else []
        self.ends = frozenset(ends if isinstance(ends, list) else [ends]) | {
            token for token in [tokenizer.eos_token_id] if token is not None
        }
        self._defaults = _defaults(model.generation_config)
        self._grammars: Any = None
        ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
        self._think = ids if all(isinstance(i, int) and i != tokenizer.unk_token_id for i in ids) else None

    def sampling(self, **asked: Any) -> Sampling:
        """Options of sampling: what is None comes from the model's generation_config.json, if it says."""
        return Sampling(**self._defaults | {name: value for name, value in asked.items() if value is not None})

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat_ids(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """The prompt of a chat. Raises BadRequest if the template does not take it."""
        if not self.chats:
            raise BadRequest(
                "messages",
                f"{self.name} has no chat template; use /v1/completions, which continues plain text, or add "
                "chat_template.jinja",
                "no_chat_template",
            )
        if tools and "tools" not in str(self.tokenizer.chat_template):
            raise BadRequest("tools", "the chat template of this model takes no tools")
        try:
            found = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )
        except Exception as error:
            raise BadRequest("messages", f"the chat template refuses this: {error}") from None
        ids: list[int] = list(found["input_ids"])
        return ids

    def plain_ids(self, text: str) -> list[int]:
        """The tokens of a text as the model expects its beginning."""
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        return ids

    def check_prompt(
        self, ids: list[int], max_tokens: int | None, fields: tuple[str, str] = ("prompt", "max_tokens")
    ) -> int:
        """How many tokens an answer may have. Raises BadRequest for a prompt that leaves no room.

        fields: what a client calls the two
        """
        if not ids:
            raise BadRequest(fields[0], "the prompt is empty; give at least one token")
        if wrong := [token for token in ids if not 0 <= token < self.vocabulary]:
            raise BadRequest(fields[0], f"there is no token {wrong[0]}")
        context = self.scheduler.context
        if len(ids) >= context or len(ids) + (max_tokens or 1) > context:
            room = f", and {max_tokens} more are asked for" if max_tokens and len(ids) < context else ""
            raise BadRequest(
                fields[bool(room)],
                f"the prompt has {len(ids)} tokens{room}, but a sequence holds {context}",
                "context_length_exceeded",
            )
        return max_tokens or context - len(ids)

    def grammar(self, schema: Any, prompt: list[int]) -> Grammar:
        """Of answers that are JSON by a schema."""
        if self._grammars is None:
            from .grammar import Grammars

            self._grammars = Grammars(self.tokenizer, self.vocabulary)
        try:
            found: Grammar = self._grammars.json(schema, prompt)
        except ValueError as error:
            raise BadRequest("response_format", f"this schema cannot be followed: {error}") from None
        return found

    async def start(
        self,
        prompt: list[int],
        sampling: Sampling,
        max_tokens: int,
        *,
        count: int = 1,
        stops: Sequence[str] = (),
        marks: Sequence[str] = (),
        schema: Any = None,
        ignore_end: bool = False,
    ) -> list["Answer"]:
        """Queue `count` answers to a prompt. Raises Busy, or BadRequest."""
        answers = []
        for i in range(count):
            seed = None if sampling.seed is None else sampling.seed + i
            options = Sampling(**vars(sampling) | {"seed": seed})
            grammar = None if schema is None else await asyncio.to_thread(self.grammar, schema, prompt)
            sampler = Sampler(options, prompt, grammar)
            stop_ids = frozenset() if ignore_end else self.ends
            answers.append(Answer(self, prompt, sampler, max_tokens, stop_ids, stops, marks))
        self.scheduler.submit(*(answer.request for answer in answers))
        return answers


def _defaults(config: Any) -> dict[str, Any]:
    """What a model's generation_config.json recommends."""
    if not config.do_sample:
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


class Answer:
    """One sequence that is being generated; pieces() is read by one coroutine of the loop that made it."""

    def __init__(
        self,
        model: TextModel,
        prompt: list[int],
        sampler: Sampler,
        max_tokens: int,
        stop_ids: frozenset[int],
        stops: Sequence[str],
        marks: Sequence[str],
    ) -> None:
        self._model, self._loop = model, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._text = TextStream(model.tokenizer, stops, marks)
        self._reasoning_text = TextStream(model.tokenizer)
        marks_in = [token for token in prompt if model._think and token in model._think]
        self._thinking = bool(marks_in) and model._think is not None and marks_in[-1] == model._think[0]
        self._unsent: list[Token] = []
        self.request = Request(prompt, sampler, max_tokens, stop_ids, self._token, self._end)

    def cancel(self) -> None:
        """Stop generating."""
        self._model.scheduler.cancel(self.request)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The answer's parts as they come. Raises what went wrong; cancels the sequence if it is left early."""
        ended = False
        try:
            while not ended:
                piece = await self._pieces.get()
                if isinstance(piece, Exception):
                    ended = True
                    raise piece
                ended = bool(piece.end)
                yield piece
        finally:
            if not ended:
                self.cancel()

    # on the scheduler's thread

    def _send(self, piece: "Piece | Exception") -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _token(self, token: Token) -> bool:
        think = self._model._think
        self._unsent.append(token)
        if think is not None and token.id in think:
            self._thinking = token.id == think[0]
            return False
        piece = Piece()
        if self._thinking:
            piece.reasoning = self._reasoning_text.add(token.id)
        else:
            piece.text = self._text.add(token.id)
        if piece.text or piece.reasoning:
            piece.tokens, self._unsent = self._unsent, []
            self._send(piece)
        return self._text.stopped

    def _end(self, how: "str | Exception") -> None:
        if isinstance(how, Exception):
            self._send(how)
        elif how == "cancelled":
            self._send(Cancelled("the request was cancelled"))
        else:
            self._send(Piece(self._text.end(), self._reasoning_text.end(), self._unsent, how))


class Cancelled(Exception):
    """The sequence was stopped from outside: a client that has gone, a time-out, a shutdown."""


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """Calls in an answer: `<tool_call>{...}</tool_call>` blocks (Hermes, Qwen), or JSON alone (Llama); [] if there are
    none.

    Each as {"name", "arguments"}, arguments a JSON text.
    """
    text = text.strip()
    blocks = [part.partition("</tool_call>")[0] for part in text.split("<tool_call>")[1:]]
    if not blocks:
        blocks = [text.removeprefix("<|python_tag|>")] if text.startswith(("{", "[", "<|python_tag|>")) else []
    calls = []
    for block in blocks:
        try:
            found = json.loads(block)
        except ValueError:
            return []
        for call in found if isinstance(found, list) else [found]:
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            if arguments is None or not isinstance(call.get("name"), str):
                return []
            calls.append(
                {"name": call["name"], "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
            )
    return calls
