"""Answers that must be JSON, by llguidance: which tokens may come next."""

import json
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
from torch import Tensor

JSON_OBJECT = {"type": "object"}
# between two parts: with any number of blanks, a small model goes on writing them until its tokens are used up
BLANKS: Any = {"whitespace_pattern": r"( |\r?\n[ \t]{0,32})"}


class Grammars:
    """The grammars of one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)
        ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
        known = all(isinstance(i, int) and i != tokenizer.unk_token_id for i in ids)
        self._think = (ids[0], ids[1]) if known else None
        # a model whose turns hold reasoning may begin with it by itself; its template then knows where it ends
        self._may_begin = "</think>" in str(tokenizer.chat_template)

    def json(self, schema: Any, prompt: list[int]) -> "JsonGrammar":
        """For an answer that is JSON by a schema. Raises ValueError for a schema that llguidance does not know."""
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=BLANKS)
        except (TypeError, ValueError) as error:
            raise ValueError(str(error)) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise ValueError(matcher.get_error().partition("\n")[0])
        return JsonGrammar(matcher, self._think, prompt, self._may_begin)


class JsonGrammar:
    """A bitnet.decode.sampling.Grammar. It waits for the end of a reasoning block, which may come first."""

    def __init__(self, matcher: Any, think: tuple[int, int] | None, prompt: list[int], may_begin: bool) -> None:
        self._matcher, self._think, self._may_begin = matcher, think, may_begin
        self._bits: Any = None
        self._reasoning = False
        if think is not None:
            marks = [token for token in prompt if token in think]
            self._reasoning = bool(marks) and marks[-1] == think[0]
            self._may_begin = may_begin and not marks

    def mask(self, logits: Tensor) -> None:
        """See Grammar."""
        if self._reasoning:
            return
        if self._bits is None:
            self._bits = llguidance.numpy.allocate_token_bitmask(1, len(logits))
        begin = logits[self._think[0]].clone() if self._think and self._may_begin else None
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        llguidance.numpy.apply_token_bitmask_inplace(logits.numpy(), self._bits)
        if begin is not None and self._think is not None:
            logits[self._think[0]] = begin

    def accept(self, token: int) -> bool:
        """See Grammar."""
        first, self._may_begin = self._may_begin, False
        if self._think is not None:
            if self._reasoning:
                self._reasoning = token != self._think[1]
                return False
            if first and token == self._think[0]:
                self._reasoning = True
                return False
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar did not take a token that it had allowed: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())
