"""The server: each field of a request does what it says or is refused by its name, and nothing that clients do harms
it."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")


from servers import save_model, serving, tokenizer  # noqa: E402

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder, max_batch=4, max_queue=16) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as connection:
        yield connection


def post(address: str, path: str, body: Any, **headers: str) -> "httpx.Response":
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    return httpx.post(f"{address}{path}", content=data, headers=headers, timeout=60)


def chat(address: str, **fields: Any) -> dict[str, Any]:
    answer = post(address, "/v1/chat/completions", {"messages": HI, "max_tokens": 12, "temperature": 0} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def events(address: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{address}{path}", json=body | {"stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def test_the_official_client_chats_whole_and_streamed(client: "openai.OpenAI") -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    options: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    plain = client.completions.create(model="tiny", prompt=["def f(", "x"], max_tokens=5, temperature=0, echo=True)
    assert [choice.text[: len(p)] for choice, p in zip(plain.choices, ["def f(", "x"], strict=True)] == ["def f(", "x"]
    answer = client.responses.create(model="tiny", input="hi", max_output_tokens=8, temperature=0)
    assert answer.output_text == text_of({"choices": [{"message": {"content": answer.output[0].content[0].text}}]})
    streamed = list(client.responses.create(model="tiny", input="hi", max_output_tokens=8, temperature=0, stream=True))
    assert "".join(e.delta for e in streamed if e.type == "response.output_text.delta") == answer.output_text
    assert streamed[-1].type == "response.incomplete"


def test_greedy_answers_are_the_models_own(address: str, folder: Path) -> None:
    import torch

    import bitnet
    from bitnet.serving.text import TextStream

    model, words = bitnet.load(folder), tokenizer()
    ids = words.apply_chat_template(HI, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    tokens, stream = output[0, ids.shape[1] :].tolist(), TextStream(words)
    begin = words.convert_tokens_to_ids("<think>")
    tokens = tokens[: tokens.index(begin)] if begin in tokens else tokens  # what follows is reasoning
    assert len(tokens) > 5
    assert text_of(chat(address, max_tokens=30)) == "".join([stream.add(token) for token in tokens]) + stream.end()


def test_a_request_among_others_gets_what_it_gets_alone(address: str) -> None:
    prompts = [f"prompt {i} " * (1 + i % 7) for i in range(16)]
    body = [{"prompt": p, "max_tokens": 5 + i % 11, "temperature": 0, "seed": i} for i, p in enumerate(prompts)]
    body += [b | {"temperature": 1.0} for b in body]

    def ask(fields: dict[str, Any]) -> str:
        while True:
            answer = post(address, "/v1/completions", fields)
            if answer.status_code != 503:
                return str(answer.json()["choices"][0]["text"])
            time.sleep(0.05)

    alone = [ask(fields) for fields in body]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, body)) == alone


def test_n_answers_share_a_prompt_and_differ_by_seed(address: str) -> None:
    asked = {"n": 3, "temperature": 1.0, "seed": 7}
    first, again = chat(address, **asked), chat(address, **asked)
    texts = [text_of(first, i) for i in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text_of(again, i) for i in range(3)]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert chat(address, temperature=1.0, seed=8) != first


def test_stop_strings_end_the_text_before_them(address: str) -> None:
    whole = text_of(chat(address, max_tokens=30))
    stop = whole[6:9]
    cut = whole.index(stop)
    answer = chat(address, max_tokens=30, stop=[stop, "never"])
    assert text_of(answer) == whole[:cut]
    assert answer["choices"][0]["finish_reason"] == "stop"
    body = {"messages": HI, "max_tokens": 30, "temperature": 0, "stop": stop}
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events(address, "/v1/chat/completions", body)]
    assert "".join(pieces) == whole[:cut]


def test_logprobs_and_bias_and_penalties_change_what_they_say(address: str) -> None:
    found = chat(address, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(found) == 12
    for token in found:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0  # greedy
    words = tokenizer()
    forced = words.encode("Z", add_special_tokens=False)[0]
    assert text_of(chat(address, logit_bias={str(forced): 100}, max_tokens=4)) == "ZZZZ"
    assert "Z" * 3 not in text_of(
        chat(address, logit_bias={str(forced): 3}, frequency_penalty=2.0, presence_penalty=2.0)
    )
    likely = [text_of(chat(address, temperature=1.0, seed=i, top_k=1)) for i in range(3)]
    assert set(likely) == {text_of(chat(address))}
    assert text_of(chat(address, temperature=1.0, seed=1, top_p=1e-6)) == likely[0]
    assert text_of(chat(address, temperature=1.0, seed=1, min_p=1.0)) == likely[0]
    plain = post(address, "/v1/completions", {"prompt": "a", "max_tokens": 3, "temperature": 0, "logprobs": 2}).json()
    assert len(plain["choices"][0]["logprobs"]["top_logprobs"]) == 3
    assert all(
        1 <= len(top) <= 2 for top in plain["choices"][0]["logprobs"]["top_logprobs"]
    )  # by text, which may repeat


def test_a_schema_is_followed_always(address: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}

    def ask(seed: int) -> None:
        answer = chat(address, response_format=form, temperature=1.5, seed=seed, max_tokens=400)
        assert answer["choices"][0]["finish_reason"] == "stop"
        person = json.loads(text_of(answer))
        assert set(person) == {"name", "age"}
        assert person["name"] in ("a", "b")
        assert 0 <= person["age"] <= 99

    for seed in range(100):
        ask(seed)


def test_json_ends_though_a_model_writes_nothing_but_blanks(address: str) -> None:
    blanks = {str(tokenizer().encode(blank)[0]): 100 for blank in " \t\r\n"}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = chat(address, response_format=form, logit_bias=blanks, max_tokens=400)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert set(json.loads(text_of(answer))) == {"name", "age"}


def test_an_answer_in_json_waits_for_the_end_of_the_reasoning(address: str) -> None:
    words = tokenizer()
    end = words.convert_tokens_to_ids("</think>")
    asked = {"chat_template_kwargs": {"enable_thinking": True}, "response_format": {"type": "json_object"}}
    answer = chat(address, **asked, max_tokens=60, temperature=1.0, seed=1, logit_bias={str(end): 4})
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"].lstrip().startswith("{")


def test_tools_are_called_where_they_must_be(address: str, client: "openai.OpenAI") -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(
            model="tiny", messages=HI, tools=[TOOL], tool_choice=choice, max_tokens=200, temperature=1.0, seed=4
        )
        call = answer.choices[0].message.tool_calls[0].function
        assert call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Rome", "Bern")
        assert answer.choices[0].finish_reason == "tool_calls"
    body = {
        "messages": HI,
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": 4,
    }
    streamed = [e["choices"][0]["delta"] for e in events(address, "/v1/chat/completions", body)]
    calls = [delta["tool_calls"][0] for delta in streamed if "tool_calls" in delta]
    assert [c["function"]["name"] for c in calls] == ["weather"]
    assert not any(delta.get("content") for delta in streamed[1:])
    refused = post(address, "/v1/chat/completions", {"messages": HI, "tool_choice": "required"})
    assert (refused.status_code, "tool_choice needs tools" in refused.text) == (400, True)


BAD = {
    "unknown field": ({"messages": HI, "foo": 1}, "foo"),
    "text for a number": ({"messages": HI, "max_tokens": "5"}, "max_tokens"),
    "number for a list": ({"messages": 5}, "messages"),
    "null prompt": ({"messages": None}, "messages"),
    "no messages": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, "role"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "temperature": ({"messages": HI, "temperature": -1}, "temperature"),
    "top_p": ({"messages": HI, "top_p": 0}, "top_p"),
    "n": ({"messages": HI, "n": 0}, "n"),
    "nested": ({"messages": HI, "stream": True, "stream_options": {"include": True}}, "stream_options.include"),
    "options without a stream": ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    "top_logprobs": ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    "choice of no tool": ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
    "bias": ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
    "bias of no token": ({"messages": HI, "logit_bias": {"99999": 1}}, "logit_bias"),
    "schema": ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "impossible schema": (
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        "response_format",
    ),
    "too long": ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
    "too many tokens": ({"messages": HI, "max_tokens": 600}, "max_tokens"),
    "too many tokens, by the newer name": ({"messages": HI, "max_completion_tokens": 600}, "max_completion_tokens"),
    "a list": ([], None),
    "a number": (5, None),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused_by_the_fields_name(address: str, what: str) -> None:
    body, field = BAD[what]
    answer = post(address, "/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    if field is not None:
        assert field in str(error["param"])


def test_other_errors_have_their_numbers(address: str) -> None:
    assert post(address, "/v1/chat/completions", b"{bad").status_code == 400
    assert post(address, "/v1/completions", {"prompt": []}).status_code == 400
    assert post(address, "/v1/completions", {"prompt": [5, 70000]}).status_code == 400
    assert post(address, "/v1/completions", b"x" * (5 << 20)).status_code == 413
    assert post(address, "/v1/nothing", {}).status_code == 404
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    for path, body in (
        ("chat/completions", {"messages": HI}),
        ("completions", {"prompt": "a"}),
        ("responses", {"input": "a"}),
    ):
        for name in ("gpt-4", "tiny@main", "../tiny"):
            answer = post(address, f"/v1/{path}", body | {"model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert post(address, "/v1/embeddings", {"input": "a"}).status_code == 400
    assert post(address, "/v1/responses", {"input": "a", "previous_response_id": "x"}).status_code == 400


def test_tokens_models_health_metrics_and_the_page(address: str) -> None:
    tokens = post(address, "/tokenize", {"prompt": "añb"}).json()
    assert tokens["count"] == 4
    assert post(address, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "añb"}
    assert post(address, "/tokenize", {"messages": HI}).json()["count"] == len("<user>hi<assistant>")
    assert post(address, "/detokenize", {"tokens": [-1]}).status_code == 400
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{address}/v1/models/other").status_code == 404
    text = httpx.get(f"{address}/metrics").text
    assert 'bitnet_requests_total{path="/health",status="200"}' in text
    assert "bitnet_first_token_seconds_bucket" in text
    page = httpx.get(address)
    assert "<title>bitnet chat</title>" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")  # nothing comes from elsewhere


def wait_until_idle(address: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while (state := httpx.get(f"{address}/health").json())["running"] or state["waiting"]:
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_stops_its_generation(address: str, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 500, "stream": stream, "ignore_eos": True, "n": 4}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    head += f"{len(data)}\r\n\r\n"
    host, _, port = address.removeprefix("http://").partition(":")
    before = httpx.get(f"{address}/metrics").text
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        connection.settimeout(60)
        if stream:
            assert b" 200 " in connection.recv(1 << 16)
        else:
            while not httpx.get(f"{address}/health").json()["running"]:
                time.sleep(0.005)
    wait_until_idle(address)

    def generated(text: str) -> float:
        return float(
            next(line for line in text.splitlines() if line.startswith("bitnet_generated_tokens_total")).split()[1]
        )

    assert generated(httpx.get(f"{address}/metrics").text) - generated(before) < 4 * 500


def test_a_key_is_asked_for_and_limits_hold(folder: Path) -> None:
    with serving(folder, api_key="secret", max_batch=1, max_queue=2, limits={"seconds": 1.5, "body": 1000}) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(address).status_code == 200
        for key in ("", "Bearer wrong", "secret2", "Bearer secretx"):
            answer = post(address, "/v1/completions", {"prompt": "a"}, Authorization=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer secret"}
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}, **right).status_code == 200
        assert post(address, "/v1/completions", {"prompt": "a" * 1000}, **right).status_code == 413
        endless = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: post(address, "/v1/completions", endless, **right), range(6)))
        assert {answer.status_code for answer in found} <= {200, 503, 504}
        busy = [answer for answer in found if answer.status_code == 503]
        assert busy
        assert busy[0].headers["retry-after"] == "5"
        assert post(address, "/v1/completions", {"prompt": "a", "n": 16}, **right).status_code == 503


def test_a_model_the_native_step_does_not_know_is_served_too(tmp_path: Path) -> None:
    import torch
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    import bitnet

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, vocab_size=259, eos_token_id=256)).eval()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with serving(tmp_path, max_batch=2) as address:
        card = httpx.get(f"{address}/v1/models").json()["data"][0]
        assert card["engine"].startswith("transformers (DiffLlamaModel is not one of")
        alone = text_of(chat(address))
        with ThreadPoolExecutor(3) as pool:
            assert [text_of(a) for a in pool.map(lambda _: chat(address), range(3))] == [alone] * 3


def test_a_checkpoint_without_a_template_continues_plain_text(tmp_path: Path) -> None:
    with serving(save_model(tmp_path, template=False)) as address:
        refused = post(address, "/v1/chat/completions", {"messages": HI})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_chat_template")
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_failing_step_fails_its_requests_and_not_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet.decode.eager import EagerSequences
    from bitnet.decode.native import NativeSequences

    with serving(folder) as address:
        with monkeypatch.context() as patch:

            def broken(*args: object) -> None:
                raise RuntimeError("out of luck")

            for sequences in (NativeSequences, EagerSequences):
                patch.setattr(sequences, "extend", broken)
            answer = post(address, "/v1/completions", {"prompt": "abc"})
            assert (answer.status_code, "out of luck" in answer.text) == (500, True)
            found = events(address, "/v1/completions", {"prompt": "abc"})
            assert found[-1]["error"]["code"] == "internal_error"
        assert post(address, "/v1/completions", {"prompt": "abc", "max_tokens": 3}).status_code == 200


def test_a_sentence_encoder_is_served(tmp_path: Path) -> None:
    import base64

    import numpy
    import torch
    from servers import serving_encoder
    from transformers import BertConfig, BertModel

    import bitnet

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=259, max_position_embeddings=64)).eval()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    tokenizer().save_pretrained(tmp_path)
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    kinds = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in folders.items()]
    (tmp_path / "modules.json").write_text(json.dumps([k | {"idx": i, "name": str(i)} for i, k in enumerate(kinds)]))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with serving_encoder(tmp_path) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            found = client.embeddings.create(model="tiny", input=["one", "another text"])
        vectors = [numpy.array(item.embedding) for item in found.data]
        wanted = bitnet.embed(tmp_path, ["one", "another text"]).numpy()
        assert numpy.allclose(vectors, wanted, atol=1e-6)
        assert found.usage.prompt_tokens == len("one") + len("another text")

        def ask(**options: Any) -> Any:
            return post(address, "/v1/embeddings", {"input": "one", **options}).json()["data"][0]["embedding"]

        assert numpy.allclose(ask(), wanted[0], atol=1e-6)
        coded = ask(encoding_format="base64")
        assert numpy.allclose(numpy.frombuffer(base64.b64decode(coded), "<f4"), wanted[0], atol=1e-6)
        short = ask(dimensions=8)
        assert numpy.isclose(numpy.linalg.norm(short), 1)
        assert len(short) == 8
        for bad in ({"input": ""}, {"input": []}, {"input": 5}, {"dimensions": 99}, {"x": 1}):
            assert post(address, "/v1/embeddings", {"input": "a"} | bad).status_code == 400
        assert post(address, "/v1/chat/completions", {"messages": HI}).status_code == 400


def command(folder: Path, *options: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "bitnet", "serve", str(folder), "--port", "0", "--device", "cpu", *options]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def wait_for_address(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith("serving "):
            return line.split(" on ")[1].split(",")[0]
    raise AssertionError("the server stopped")


def test_the_command_serves_and_finishes_what_runs_when_it_is_stopped(folder: Path) -> None:
    server = command(folder, "--name", "mine", "--max-batch", "2")
    try:
        address = wait_for_address(server)
        if curl := shutil.which("curl"):
            body = json.dumps({"prompt": "a", "max_tokens": 3, "model": "mine"})
            done = subprocess.run(
                [curl, "-sf", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", body],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert json.loads(done.stdout)["model"] == "mine"
        body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
        if server.stderr:
            server.stderr.close()


def test_a_taken_port_is_one_clear_error(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = [sys.executable, "-m", "bitnet", "serve", str(folder), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_crowd_gets_its_answers_and_harms_nothing(folder: Path) -> None:
    """64 clients with 20 requests each: good ones, and all kinds of bad ones."""
    import random

    server = command(folder, "--api-key", "k", "--max-queue", "4096")
    try:
        address, right = wait_for_address(server), {"Authorization": "Bearer k"}
        good = [{"prompt": f"text {i} " * (1 + i % 9), "max_tokens": 3 + i % 12, "temperature": 0} for i in range(40)]
        alone = [post(address, "/v1/completions", b, **right).json()["choices"][0]["text"] for b in good]
        start = memory(server.pid)

        def client(number: int) -> int:
            dice, answered = random.Random(number), 0
            for _ in range(20):
                kind = dice.choice(["good"] * 6 + ["gone", "json", "large", "unknown", "long", "key"])
                i = dice.randrange(40)
                if kind == "good":
                    answer = post(address, "/v1/completions", good[i], **right)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["choices"][0]["text"] == alone[i]
                    answered += 1
                elif kind == "gone":
                    with contextlib.suppress(httpx.TimeoutException):
                        httpx.post(
                            f"{address}/v1/completions", json=good[i] | {"max_tokens": 400}, headers=right, timeout=0.05
                        )
                elif kind == "json":
                    assert post(address, "/v1/completions", b"{" * dice.randrange(1, 99), **right).status_code == 400
                elif kind == "large":
                    with contextlib.suppress(httpx.WriteError):  # it may hang up before it has read all
                        assert post(address, "/v1/completions", b"x" * (10 << 20), **right).status_code == 413
                elif kind == "unknown":
                    assert post(address, "/v1/completions", {"prompt": "a", "nothing": 1}, **right).status_code == 400
                elif kind == "long":
                    assert post(address, "/v1/completions", {"prompt": "x" * 2000}, **right).status_code == 400
                else:
                    assert post(address, "/v1/completions", good[i]).status_code == 401
            return answered

        with ThreadPoolExecutor(64) as pool:
            assert sum(pool.map(client, range(64))) > 400
        wait_until_idle(address, 60)
        assert post(address, "/v1/completions", good[3], **right).json()["choices"][0]["text"] == alone[3]
        assert memory(server.pid) < start + 150
    finally:
        server.kill()
        server.wait()
        if server.stderr:
            server.stderr.close()


def memory(process: int) -> int:
    """In MB; 0 where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS")), 0)
