"""Text to train on that every machine has: the standard library's sources, byte by byte."""

import sysconfig
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = 256  # end-of-text token; tokens 0..255 are bytes


VOCABULARY = 257


LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def corpus() -> tuple[Tensor, Tensor, dict[str, int]]:
    """The standard library's own sources as tokens: training, held-out, and their file and byte counts.

    One file in twenty is held out, by a checksum of its path, so no file is in both. Tests and tables are left
    out: Python installations differ in them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not LEFT_OUT.intersection(relative.parts):
            parts[zlib.crc32(relative.as_posix().encode()) % 20 == 0].append(path.read_bytes())
    if not parts[True]:
        raise FileNotFoundError(f"no Python sources under {root}; quickstart needs an installation with its .py files")

    def tokens(files: list[bytes]) -> Tensor:
        end = torch.tensor([END], dtype=torch.int16)
        return torch.cat([t for f in files if f for t in (torch.frombuffer(bytearray(f), dtype=torch.uint8), end)])

    training, held_out = tokens(parts[False]), tokens(parts[True])
    facts = {"training_files": len(parts[False]), "training_bytes": len(training)}
    return training, held_out, facts | {"held_out_files": len(parts[True]), "held_out_bytes": len(held_out)}


def build_tokenizer() -> Any:
    """Bytes as tokens, in Hugging Face's terms: token i < 256 is byte i, 256 is <|end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast
