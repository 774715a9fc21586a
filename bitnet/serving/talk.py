"""A conversation in the terminal."""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from .model import BadRequest, TextModel
from .run import Options, load_text_model

HELP = """\
/reset          forget the conversation
/undo           forget the last question and its answer
/again          answer the last question once more
/system TEXT    set the system prompt (nothing: none) and begin anew
/set NAME X     temperature, top_p, top_k, min_p, repetition_penalty, seed or max_tokens
/save FILE      write the conversation as JSON
/help           this list
/exit           leave; so does Ctrl-D
A line that ends in \\ goes on in the next one; a line of \"\"\" begins and ends a text of many. Ctrl-C stops an
answer."""
_NUMBERS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
_NUMBERS |= {"seed": int, "max_tokens": int}


class Talk:
    """A conversation: its turns and settings; say() answers, command() does what begins with a slash."""

    def __init__(self, model: TextModel, system: str | None = None, **settings: Any) -> None:
        self.model, self.system = model, system
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.turns: list[dict[str, str]] = []

    async def say(self, text: str | None) -> None:
        """Print the answer to a text, or with None once more to the last question."""
        if text is not None:
            self.turns.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        settings = dict(self.settings)
        try:
            prompt = self.model.chat_ids([*system, *self.turns])
            most = self.model.check_prompt(prompt, settings.pop("max_tokens", None))
        except BadRequest as error:
            if text is not None:
                self.turns.pop()
            raise ValueError(str(error)) from None
        answer = (await self.model.start(prompt, self.model.sampling(**settings), most))[0]
        said, start, first = "", time.perf_counter(), 0.0
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    first = first or time.perf_counter()
                    print(piece.reasoning + piece.text, end="", flush=True)
                    said += piece.text
        except asyncio.CancelledError:
            print(" [stopped]", end="")
        self.turns.append({"role": "assistant", "content": said})
        print(flush=True)
        count, seconds = answer.request.generated, time.perf_counter() - (first or start)
        if count > 1:
            wait = f"first after {first - start:.2f} s"
            print(f"[{count} tokens, {(count - 1) / max(seconds, 1e-9):.1f} tokens/s, {wait}]", file=sys.stderr)

    def command(self, line: str) -> bool:
        """Do what a line asks for; whether the last question is to be answered again. Raises ValueError, EOFError."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit", "bye"):
            raise EOFError
        if name == "help":
            print(HELP)
        elif name == "reset":
            self.turns.clear()
        elif name == "system":
            self.system = rest or None
            self.turns.clear()
        elif name in ("undo", "again"):
            while self.turns and self.turns[-1]["role"] == "assistant":
                self.turns.pop()
            if not self.turns:
                raise ValueError("nothing was asked yet")
            if name == "again":
                return True
            self.turns.pop()
        elif name == "save" and rest:
            system = [{"role": "system", "content": self.system}] if self.system else []
            Path(rest).expanduser().write_text(json.dumps([*system, *self.turns], indent=2, ensure_ascii=False) + "\n")
        elif name == "set" and len(rest.split()) == 2 and rest.split()[0] in _NUMBERS:
            which, value = rest.split()
            self.settings[which] = _NUMBERS[which](value)
        else:
            raise ValueError(f"/{name} is not known, or lacks something; /help lists what there is")
        return False


def read(prompt: str = "> ") -> str:
    """What the user types: a line, or several. Raises EOFError at the end."""
    shown = prompt if sys.stdin.isatty() else ""
    line = input(shown)
    if line.strip() == '"""':
        lines = []
        while (line := input("." if shown else "")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("." if shown else "")
    return line


def talk(checkpoint: str, options: Options, system: str | None = None, **settings: Any) -> None:
    """Chat until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  what was typed comes back with the arrows
    model = load_text_model(checkpoint, options)
    if not model.chats:
        raise ValueError(f"{checkpoint} has no chat template; `bitnet generate` continues plain text")
    talk = Talk(model, system, **settings)
    if sys.stdin.isatty():
        print(f"{checkpoint} ({model.engine} decoding); /help lists commands", file=sys.stderr)
    with asyncio.Runner() as runner:
        while True:
            try:
                text = read().strip()
                if not text:
                    continue
                again = talk.command(text) if text.startswith("/") else None
                if again is not False:
                    runner.run(talk.say(None if again else text))
            except EOFError:
                break
            except KeyboardInterrupt:
                print()
            except (ValueError, OSError) as error:
                print(f"bitnet chat: {error}", file=sys.stderr)
    model.scheduler.drain(0)
