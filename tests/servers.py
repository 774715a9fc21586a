"""A tiny chat model with a tokenizer that has reasoning and tools, and a server in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bitnet

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>{% if enable_thinking %}<think>{% "
    "endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes, with an end and reasoning marks."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<think>", "</think>"])
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    found.chat_template = TEMPLATE
    return found


def save_model(directory: Path, template: bool = True, **changes: Any) -> Path:
    """Random weights, packed, with a head of 8 bits, whose products are the same for one sequence and many."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes, eos_token_id=256, bos_token_id=None, pad_token_id=256))
    bitnet.replace_linear(model)
    bitnet.pack(model, head="int8")
    bitnet.save(model, directory)
    words = tokenizer()
    if not template:
        words.chat_template = None
    words.save_pretrained(directory)
    return directory


@contextmanager
def serving(
    directory: Path, api_key: str | None = None, limits: dict[str, Any] | None = None, **options: Any
) -> Iterator[str]:
    """The address of a server in a thread of this process; options: of bitnet.serving.run.Options."""
    from bitnet.serving.app import Limits, Server
    from bitnet.serving.run import Options, load_text_model

    model = load_text_model(str(directory), Options(device="cpu", **options))
    model.name = "tiny"
    with running(Server("tiny", model, None, Limits(**limits or {})), api_key) as address:
        yield address


@contextmanager
def serving_encoder(directory: Path) -> Iterator[str]:
    """The same of a sentence encoder."""
    from bitnet.serving.app import Limits, Server
    from bitnet.serving.embed import Encoder

    with running(Server("tiny", None, Encoder(directory, device="cpu"), Limits())) as address:
        yield address


@contextmanager
def running(server: Any, api_key: str | None = None) -> Iterator[str]:
    import socket

    import uvicorn

    from bitnet.serving.app import create_app

    running = uvicorn.Server(uvicorn.Config(create_app(server, api_key), log_level="error", lifespan="on"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
