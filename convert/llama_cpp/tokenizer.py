"""Tokenizers in GGUF metadata: written from, and turned back into, tokenizer.json.

llama.cpp has its own tokenizers. It knows how text is cut before byte-pair merges run only by a name,
`tokenizer.ggml.pre`, so a tokenizer.json can be written where its rule is one that has a name.
"""

import json
from pathlib import Path
from typing import Any

import gguf

from ..hub.tokenizers import load_tokenizer, reading
from .header import Value

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST

Steps = tuple[tuple[str, Any], ...]

# Name of a rule in llama.cpp (src/llama-vocab.cpp): the steps of tokenizer.json's pre_tokenizer, and ignore_merges.
PRE: dict[str, tuple[Steps, bool]] = {
    "gpt-2": ((("ByteLevel", True),), False),
    "llama-bpe": ((("Split", LLAMA3), ("ByteLevel", False)), True),
    "smaug-bpe": ((("Split", LLAMA3), ("ByteLevel", False)), False),
    "qwen2": ((("Split", QWEN2), ("ByteLevel", False)), False),
    "smollm": ((("Digits", True), ("ByteLevel", True)), False),
    "default": (  # llama.cpp's rule for a file that names none
        (
            ("Split", r"[\p{P}\$\+<=>\^~\|]+"),
            ("Split", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            ("Split", r"\p{N}+"),
            ("Split", "[0-9][0-9][0-9]"),
            ("ByteLevel", False),
        ),
        False,
    ),
    "falcon": (
        (("Punctuation", "Contiguous"), ("ByteLevel", True), ("Digits", False), ("Split", "[0-9][0-9][0-9]")),
        False,
    ),
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
}
NO_TOKENIZER: dict[str, Value] = {"tokenizer.ggml.model": "no_vocab"}  # what llama.cpp takes in place of one
LONGEST = 4096  # characters of a token
SPACE = "\u2581"  # sentencepiece's mark for a space
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's word: transformers'


def metadata_of(directory: Path, config: Any) -> dict[str, Value]:
    """What llama.cpp needs to know of the tokenizer in a checkpoint directory.

    config: the model's; gives the vocabulary size, and the end token if the tokenizer names none

    Raises ValueError with the reason for a tokenizer that llama.cpp would run otherwise, or that is missing.
    """
    tokenizer, described = _load(directory)
    model = described["model"]
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has the token {max(vocabulary.values())}, but the model's vocabulary ends at "
            f"{config.vocab_size - 1}"
        )
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    added = tokenizer.added_tokens_decoder
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
        if i in added:
            types[i] = int(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
            if added[i].normalized and not added[i].special and model.get("byte_fallback"):
                tokens[i] = token.replace(SPACE, " ")  # llama.cpp looks for it before it marks spaces
    if model["type"] != "BPE":
        raise ValueError(f"{directory}: its tokenizer is a {model['type']} model; llama.cpp gets BPE ones from here")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    metadata: dict[str, Value] = {}
    if model.get("byte_fallback"):
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        metadata["tokenizer.ggml.add_space_prefix"] = _space_prefix(directory, described)
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        metadata["tokenizer.ggml.scores"] = [-float(ranks.get(token, len(merges))) for token in tokens]
        for token, i in vocabulary.items():
            if token == model["unk_token"]:
                types[i] = int(gguf.TokenType.UNKNOWN)
            elif len(token) == 6 and token.startswith("<0x"):
                types[i] = int(gguf.TokenType.BYTE)
    else:
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(directory, described)}
        metadata["tokenizer.ggml.merges"] = merges
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for word, ours in SPECIAL.items():
        token_id = getattr(tokenizer, f"{ours}_token_id")
        if token_id is None and ours == "eos":
            token_id = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
            if token_id is None:
                raise ValueError(
                    f"{directory}: neither the tokenizer nor config.json names an end token; llama.cpp would stop at "
                    "another, so set eos_token"
                )
        if token_id is not None:
            metadata[f"tokenizer.ggml.{word}_token_id"] = token_id
    metadata |= _added_around(directory, tokenizer)
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def save_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write the tokenizer that a GGUF file's metadata describes as tokenizer.json and what belongs to it.

    Raises ValueError for kinds and pre-tokenizers there is no rule for here.
    """
    tokenizer_of(metadata).save_pretrained(directory)


def tokenizer_of(metadata: dict[str, Any]) -> Any:
    """The tokenizer that a GGUF file's metadata describes, as transformers has it; ValueError as above."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = _take(metadata, "model", str, None)
    if kind not in ("gpt2", "llama"):
        found = "the file has no tokenizer" if kind in (None, *NO_TOKENIZER.values()) else f"its tokenizer is {kind!r}"
        raise ValueError(f"{found}; 'gpt2' and 'llama' are read here. Convert it without one: --no-tokenizer")
    described = _byte_level(metadata) if kind == "gpt2" else {}
    tokens: list[str] = _array(metadata, "tokens", str)
    if len({*tokens}) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice; it is damaged, so convert or download it again")
    types: list[int] = _array(metadata, "token_type", int, [int(gguf.TokenType.NORMAL)] * len(tokens), len(tokens))
    marked = {int(gguf.TokenType.CONTROL): True, int(gguf.TokenType.USER_DEFINED): False}
    described = described or _sentencepiece(metadata, tokens, types)
    described["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described["added_tokens"] = [
        {"id": i, "content": token, "special": marked[kind], **plain}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in marked
    ]
    special = {
        f"{ours}_token": tokens[token_id]
        for word, ours in SPECIAL.items()
        if (token_id := _take(metadata, f"{word}_token_id", int, None)) is not None and 0 <= token_id < len(tokens)
    }
    described["post_processor"] = _template(metadata, special, kind)
    text = json.dumps({"version": "1.0", "truncation": None, "padding": None, **described})
    with reading("the file's tokenizer"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **special)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template is a {type(template).__name__}, not text")
    tokenizer.chat_template = template
    return tokenizer


def _take(metadata: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    """tokenizer.ggml.<key>, which must be of this type."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if value is not None and type(value) is not kind:
        raise ValueError(f"tokenizer.ggml.{key} is {value!r:.80}, not of type {kind.__name__}; the file is damaged")
    return value


def _array(metadata: dict[str, Any], key: str, kind: type, default: Any = None, length: int | None = None) -> list[Any]:
    """tokenizer.ggml.<key>, which must be an array of this type, and as long as that."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ValueError(f"tokenizer.ggml.{key} is {value!r:.80}, not an array of {kind.__name__}; the file is damaged")
    if length not in (None, len(value)):
        raise ValueError(f"tokenizer.ggml.{key} has {len(value)} elements for {length} tokens; the file is damaged")
    return value


def _load(directory: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer that transformers loads, and its parts as tokenizer.json has them."""
    tokenizer = load_tokenizer(directory, "; llama.cpp needs one, but the file can be written without: --no-tokenizer")
    try:
        return tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError as error:
        raise ValueError(f"{directory}: its tokenizer cannot be read as tokenizer.json ({error})") from None


def _steps(part: dict[str, Any] | None) -> Steps:
    """A pre_tokenizer of tokenizer.json, reduced to what decides how text is cut."""
    if part is None:
        return ()
    if part["type"] == "Sequence":
        return sum((_steps(step) for step in part["pretokenizers"]), ())
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return (("ByteLevel", part["use_regex"]),)
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return (("Split", part["pattern"].get("Regex")),)
    if part["type"] == "Digits":
        return (("Digits", part["individual_digits"]),)
    if part["type"] == "Punctuation":
        return (("Punctuation", part["behavior"]),)
    return ((part["type"], part),)


def _pre(directory: Path, described: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level tokenizer's rule."""
    if (described["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # NFC: Qwen's, which llama.cpp leaves out
        raise ValueError(
            f"{directory}: the tokenizer normalizes text ({described['normalizer']['type']}), which llama.cpp's "
            "byte-level tokenizer does not"
        )
    steps, model = _steps(described["pre_tokenizer"]), described["model"]
    if not model["merges"] and ("ByteLevel", False) in steps:
        return "gpt-2"  # every byte stands alone, however the text was cut before
    for name, rule in PRE.items():
        if rule == (steps, bool(model.get("ignore_merges"))):
            return name
    raise ValueError(
        f"{directory}: its pre-tokenizer is none that llama.cpp has a name for among {', '.join(PRE)}: "
        f"{json.dumps(described['pre_tokenizer'])}, ignore_merges {bool(model.get('ignore_merges'))}"
    )


def _space_prefix(directory: Path, described: dict[str, Any]) -> bool:
    """Does a sentencepiece-like tokenizer put a space before the text? Raises ValueError for other rules."""
    normalizer, pre = described["normalizer"], described["pre_tokenizer"]
    if normalizer and pre and pre["type"] == "Split" and pre["pattern"] == {"String": " "}:
        pre = None  # Gemma's: the normalizer leaves no space to cut at
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and parts in ([{"type": "Prepend", "prepend": SPACE}, replace], [replace]):
        return len(parts) == 2
    if not parts and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
        scheme = pre.get("prepend_scheme", "always")
        if scheme != "first" and pre["replacement"] == SPACE:
            return bool(scheme == "always")
    raise ValueError(
        f"{directory}: llama.cpp puts a space before the text and behind every special token, or nowhere; this "
        f"tokenizer has another rule: normalizer {json.dumps(normalizer)}, pre_tokenizer {json.dumps(pre)}"
    )


def _added_around(directory: Path, tokenizer: Any) -> dict[str, Value]:
    """Which special tokens the tokenizer puts around a text, found by trying."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in ([], [bos]):
        for after in ([], [eos]):
            if full == [*before, *plain, *after]:
                return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
    raise ValueError(f"{directory}: the tokenizer puts other tokens around a text than llama.cpp can, bos and eos")


def _byte_level(metadata: dict[str, Any]) -> dict[str, Any]:
    name = _take(metadata, "pre", str, "default")
    rule = PRE.get(ALIASES.get(name, name))
    if rule is None:
        raise ValueError(
            f"the file's pre-tokenizer is {name!r}; known here are {', '.join([*PRE, *ALIASES])}. Convert it without "
            "its tokenizer: --no-tokenizer"
        )
    forms = {
        "ByteLevel": lambda regex: {"add_prefix_space": False, "trim_offsets": True, "use_regex": regex},
        "Split": lambda regex: {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        "Digits": lambda individual: {"individual_digits": individual},
        "Punctuation": lambda behavior: {"behavior": behavior},
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": kind, **forms[kind](detail)} for kind, detail in rule[0]],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": rule[1],
            "merges": [merge.split(" ") for merge in _array(metadata, "merges", str, [])],
        },
    }


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Merges in the order of the scores: sentencepiece joins the pair that makes the piece with the highest score."""
    scores = _array(metadata, "scores", float, length=len(tokens))
    if longest := next((token for token in tokens if len(token) > LONGEST), None):
        raise ValueError(f"tokenizer.ggml.tokens holds one of {len(longest):,} characters; the file is damaged")
    pieces = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)  # runs of spaces are both in Gemma's vocabulary
    normal = {t: i for i, t in enumerate(tokens) if types[i] in pieces and " " not in t}
    merges = [
        (-scores[i], normal[token[:cut]], normal[token[cut:]], [token[:cut], token[cut:]])
        for token, i in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    unknown = _take(metadata, "unknown_token_id", int, 0)
    if not 0 <= unknown < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id is {unknown}, of {len(tokens)} tokens; the file is damaged")
    prefix = _take(metadata, "add_space_prefix", bool, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }


def _template(metadata: dict[str, Any], special: dict[str, str], kind: str) -> dict[str, Any] | None:
    """The post_processor that puts bos and eos around a text, where the file asks for them."""
    pre = _take(metadata, "pre", str, "")
    default = {"bos": kind == "llama" or ALIASES.get(pre, pre) == "llama-bpe", "eos": False}  # llama.cpp's
    pieces: dict[str, list[dict[str, Any]]] = {}
    tokens = {}
    for word in default:
        token = special.get(f"{word}_token")
        wanted = token is not None and _take(metadata, f"add_{word}_token", bool, default[word])
        pieces[word] = [{"SpecialToken": {"id": token, "type_id": 0}}] if wanted else []
        if wanted:
            tokens[token] = {"id": token, "ids": [metadata[f"tokenizer.ggml.{word}_token_id"]], "tokens": [token]}
    if not tokens:
        return None
    single, second = (
        [*pieces["bos"], {"Sequence": {"id": name, "type_id": i}}, *pieces["eos"]] for i, name in enumerate("AB")
    )
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}
