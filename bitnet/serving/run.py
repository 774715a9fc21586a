"""From a checkpoint to a running server, or to a model that answers in this process."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..convert.checkpoint import add_adapter, dtype_to_run, load, weight_files
from ..convert.folders import find_folder
from ..convert.hub.tokenizers import load_tokenizer
from ..kernels.cpu import pages

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """How a model is loaded and shared. loaded: is called when the weights and the tokenizer are there."""

    head: str | None = None
    adapter: str | None = None
    backend: str = "auto"
    activation_bits: int | str | None = "auto"
    device: str | None = None
    context: int | None = None
    max_batch: int = 8
    max_queue: int = 64
    loaded: Callable[[], None] = lambda: None


def load_both(checkpoint: str, options: Options) -> tuple[Any, Any]:
    """A causal language model and its tokenizer."""
    folder = find_folder(checkpoint)
    weight_files(folder)  # a clear error before anything slow
    tokenizer = load_tokenizer(folder)
    pages.trim()
    device = options.device or default_device()
    model = load(
        folder,
        device=device,
        dtype=dtype_to_run(folder, device),
        backend=options.backend,
        activation_bits=options.activation_bits,
        head=options.head,
    )
    if not hasattr(model, "generate"):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, which does not generate text")
    if options.adapter is not None:
        add_adapter(model, options.adapter)
    options.loaded()
    return model.eval(), tokenizer


def load_text_model(checkpoint: str, options: Options) -> Any:
    """A bitnet.serving.model.TextModel."""
    from .model import TextModel

    model, tokenizer = load_both(checkpoint, options)
    slots, queue, context = options.max_batch, options.max_queue, options.context
    return TextModel(model, tokenizer, checkpoint, slots=slots, queue=queue, context=context)


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def serve(
    checkpoint: str,
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    seconds: float = 600,
    body: int = 4 << 20,
    name: str | None = None,
    ready: Callable[[int], None] | None = None,
) -> None:
    """Serve a checkpoint until a signal stops it; ready: is told the port once it listens (0 takes a free one)."""
    try:
        import uvicorn

        from .app import Limits, Server, create_app
    except ImportError as error:
        raise ImportError(f"serving needs more packages ({error.name}): pip install 'bitnet-toolkit[serve]'") from None
    from ..convert.hub.sentences import read_sentences
    from .embed import Encoder

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))  # before anything slow
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None
        folder = find_folder(checkpoint)
        weight_files(folder)
        if read_sentences(folder) is not None:
            if options.adapter is not None:
                raise ValueError(f"{checkpoint} is a sentence encoder, which --adapter is not for")
            encoder, model = (
                Encoder(folder, device=options.device or default_device(), backend=options.backend),
                None,
            )
            options.loaded()
        else:
            encoder, model = None, load_text_model(checkpoint, options)
        served = name or checkpoint
        if model is not None:
            model.name = served
        server = Server(served, model, encoder, Limits(seconds=seconds, body=body))
        config = uvicorn.Config(
            create_app(server, api_key),
            log_level="warning",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(server.limits.drain),
            limit_concurrency=1024,
        )
        listening.listen(256)
        where = listening.getsockname()[1]
        what = "embeddings" if model is None else f"{model.engine} decoding, {options.max_batch} at a time"
        print(f"serving {served} ({what}) on http://{host}:{where}, chat page at /", file=sys.stderr)
        if host not in LOOPBACK and api_key is None:
            print("warning: everyone who can reach this address can use it; set --api-key", file=sys.stderr)
        if model is not None and not model.chats:
            print("note: there is no chat template; /v1/completions continues plain text", file=sys.stderr)
        if ready is not None:
            ready(where)
        uvicorn.Server(config).run(sockets=[listening])
