"""From tokens to text as it comes: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Text of tokens that arrive one by one.

    stops: strings that end the text, themselves not a part of it. What might be the beginning of one is held back until
    the next tokens tell. marks: strings from which on text is held back to the end (of tool calls).
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), marks: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops, self._marks = tokenizer, [s for s in stops if s], [m for m in marks if m]
        self._ids: list[int] = []
        self._shown = self._begin = 0  # tokens whose text has been given; from which on they are decoded again
        self._held = ""
        self.stopped = self.marked = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` says whether a stop string came."""
        self._ids.append(token)
        before = self._decode(self._begin, self._shown)
        after = self._decode(self._begin, len(self._ids))
        if after.endswith("\ufffd") and len(self._ids) - self._shown < 8:  # a character is not complete yet
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return self._give(after[len(before) :])

    def end(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._begin, len(self._ids))[len(self._decode(self._begin, self._shown)) :]
        self._shown = len(self._ids)
        text, self._held = self._give(rest) + self._held, ""
        return text

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _give(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        if self.marked:
            keep = 0
        else:
            marks = [at for at in (text.find(mark) for mark in self._marks) if at >= 0]
            self.marked = bool(marks)
            keep = min(marks) if marks else len(text) - _overlap(text, [*self._stops, *self._marks])
        self._held = text[keep:]
        return text[:keep]


def _overlap(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of text that one of the strings begins with."""
    for length in range(min(len(text), max(map(len, strings), default=1) - 1), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
