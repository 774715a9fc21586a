import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import checkpoint  # noqa: F401

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator["openai.OpenAI"]:  # noqa: F811
    """The official client, connected to `bitnet serve` on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "bitnet", "serve", str(checkpoint), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, f"the server stopped: {server.stdout.read() if server.stdout else ''}"
            assert time.monotonic() < deadline, "the server did not come up in 120 s"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as connection:
            yield connection
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdout:
            server.stdout.close()


def test_the_served_directory_is_the_listed_model(client: "openai.OpenAI", checkpoint: Path) -> None:  # noqa: F811
    assert [model.id for model in client.models.list()] == [str(checkpoint)]


def test_a_chat_completion_streams_in_pieces(client: "openai.OpenAI") -> None:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "def f("}]
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0, stream=True)
    chunks = [chunk for chunk in stream if chunk.choices]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
    # a stream holds back a last character whose bytes are not all there; the whole answer shows it as U+FFFD
    assert "".join(pieces).rstrip("\ufffd") == (whole.choices[0].message.content or "").rstrip("\ufffd")


def test_a_chat_without_a_template_gets_the_reason(tmp_path: Path) -> None:
    """Checked on the handlers: starting a second server takes long."""
    import asyncio

    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    from bitnet.serve import _app

    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    originals = {handler: handler.handle_request for handler in (ChatCompletionHandler, ResponseHandler)}
    try:
        _app(str(tmp_path))
        for handler in originals:
            with pytest.raises(HTTPException, match="no chat template") as error:
                asyncio.run(handler.handle_request(None, {}, "id"))
            assert error.value.status_code == 400
    finally:
        for handler, original in originals.items():
            handler.handle_request = original
