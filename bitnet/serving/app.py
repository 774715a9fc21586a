"""A checkpoint behind transformers' OpenAI-compatible server."""

from collections.abc import Sequence
from typing import Any


def serve(checkpoint: str, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` on a local checkpoint with our layers registered; blocks until it is stopped.

    options: command-line options of `transformers serve`
    """
    import bitnet.convert.hub.quantizer  # noqa: F401  registers our layers
    from bitnet.convert.checkpoint import weight_files

    app = _app()
    if "--help" not in options:
        weight_files(checkpoint)  # a clear error before the server starts
    app([checkpoint, *options, "--non-blocking"], prog_name="bitnet serve", standalone_mode=False)


def _app() -> Any:
    """transformers' serve command, behind our door."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("serving needs more packages: pip install 'bitnet-toolkit[serve]'")
    import typer

    from .door import Server

    app = typer.Typer(add_completion=False)
    app.command()(Server)
    return app
