import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import checkpoint  # noqa: F401

openai = pytest.importorskip("openai")


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """`bitnet serve` on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "bitnet", "serve", str(folder), *options]
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
        yield port
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdout:
            server.stdout.close()


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Iterator[int]:  # noqa: F811
    with serving(checkpoint) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator["openai.OpenAI"]:
    """The official client, connected to it."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as connection:
        yield connection


def post(port: int, path: str, data: bytes, kind: str = "application/json") -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


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


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/load_model"])
def test_only_the_served_model_answers_and_no_other_is_loaded(
    path: str,
    port: int,
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(checkpoint, tmp_path / "other")  # which could be loaded
    content = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a"}
    for name in (str(tmp_path / "other"), "gpt-4", f"{checkpoint}@main", 5):
        status, text = post(port, path, json.dumps({"model": name, **content}).encode())
        assert status == 404
        assert f"there is no model {name!r} here, only {str(checkpoint)!r}" in json.loads(text)["error"]["message"]


def test_a_form_names_no_other_model_either(port: int, tmp_path: Path) -> None:
    pytest.importorskip("multipart")
    parts = {"model": str(tmp_path), "file": "x"}
    lines = []
    for name, value in parts.items():
        file = '; filename="x.wav"' if name == "file" else ""
        lines += ["--edge", f'Content-Disposition: form-data; name="{name}"{file}', "", value]
    data = "\r\n".join([*lines, "--edge--", ""]).encode()
    status, text = post(port, "/v1/audio/transcriptions", data, "multipart/form-data; boundary=edge")
    assert status == 404
    assert f"there is no model '{tmp_path}" in text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_away_stops_its_generation(path: str, stream: bool, port: int) -> None:
    """Answers are made one after the other: the next one comes only because the endless one before it was given up."""
    endless = json.dumps({"max_new_tokens": 10**6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0})
    body: dict[str, Any] = {"generation_config": endless, "stream": stream}
    body |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        connection.settimeout(60)
        if stream:
            assert b" 200 " in connection.recv(1 << 16)
        else:
            time.sleep(1)
    status, text = post(port, "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 2}).encode())
    assert status == 200, text


def answer(app: Any, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Of an ASGI application, without a server."""
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "POST", "path": path}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_a_chat_without_a_template_is_refused_with_the_reason(path: str) -> None:
    from bitnet.serving.door import Checks

    async def server(scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": asked["model"].encode()})

    for template in (True, False):
        status, text = answer(Checks(server, "mine", template), path, {"model": "mine"})
        if template or path == "/v1/completions":
            assert (status, text) == (200, "mine")
        else:
            assert status == 400
            assert "mine has no chat template" in json.loads(text)["error"]["message"]
    own = {"model": "mine", "chat_template_kwargs": {"chat_template": "{{ messages }}"}}
    assert answer(Checks(server, "mine", False), path, own) == (200, "mine")


@pytest.mark.slow
def test_a_checkpoint_without_a_template_is_served_for_plain_text(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(checkpoint, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with serving(tmp_path / "plain") as port:
        message = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        status, text = post(port, "/v1/chat/completions", json.dumps(message).encode())
        assert (status, "no chat template" in text) == (400, True)
        assert post(port, "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 2}).encode())[0] == 200
