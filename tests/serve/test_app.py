"""The server over HTTP: OpenAI's interface to the letter, limits, refusals of one line, clients that leave."""

import http.client
import json
import random
import socket
import threading
import time
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hostile import NOISE, hostile_files, write
from local_server import EMPTY, Server, data_url, say, show
from PIL import Image

from data import prepare_image, render_dialogue
from inputs.images import IN_MEMORY
from inputs.records import Turn
from insight.maps import Answer, attention_map, find_words
from llava import generate
from serve import __main__ as command

limits = pytest.importorskip("serve.requests", exc_type=ImportError)
prepare_job = pytest.importorskip("serve.prompts", exc_type=ImportError).prepare_job

PATH = "/v1/chat/completions"


def assert_refused(answer: dict, status: int, *words: str):
    error = answer["error"]
    assert answer["status code"] == status, answer
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"].splitlines()) == 1
    assert len(error["message"]) < 400 and all(word in error["message"] for word in words), error


def prompt_of(server: Server, *turns: Turn) -> list[int]:
    return render_dialogue(list(turns), server.tokenizer, server.model.config.template, 9)[0]


def text_alone(server: Server, prompt: list[int], features=None, length: int = 12) -> str:
    ids = [i for (i,) in generate(server.model, [prompt], features, max_new_tokens=length)]
    return server.tokenizer.decode(ids).lstrip()


def events(text: str) -> list:
    lines = text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# the interface


def test_models_and_health(server):
    models = server.get("/v1/models")
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["babbler"]
    assert models["data"][0].keys() == {"id", "object", "created", "owned_by"}
    health = server.get("/health")
    assert health["status"] == "ok" and health["vision"] is True and health["rows"] == 8


def test_a_completion(server):
    prompt = prompt_of(server, Turn("Hello", None))
    answer = server.ask("Hello", model="babbler")
    text = text_alone(server, prompt)
    assert answer["object"] == "chat.completion" and answer["model"] == "babbler" and answer["id"] and answer["created"]
    message = {"role": "assistant", "content": text}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}


def test_a_stream(server):
    values = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "stream": True}
    values["stream_options"] = {"include_usage": True}
    _, text = server.request("POST", PATH, json.dumps(values).encode())
    *chunks, last = events(text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert all(c["object"] == "chat.completion.chunk" and c["usage"] is None and c["id"] == last["id"] for c in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    pieces = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(pieces) == text_alone(server, prompt_of(server, Turn("Hello", None))) and len(pieces) > 6


def test_turns_and_images_are_rendered_as_in_training(server, world_images):
    """The number of prompt tokens and the answer are those of data.render_dialogue and llava.generate."""
    a, b = world_images[:2]
    content = [say("Is "), show(a), say(" or "), show(b), say(" red?")]
    turn = Turn("Is  or  red?", None, 2, parts=("Is ", " or ", " red?"))
    messages = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": content}
    ]  # fmt: skip
    prompt = prompt_of(server, Turn("Hi", "Yes"), turn)
    answer = server.ask("", messages=messages)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert prompt.count(server.tokenizer.image_id) == 18
    swapped = server.ask([say("Is "), show(b), say(" or "), show(a), say(" red?")])
    assert swapped["choices"] != answer["choices"]


@pytest.mark.parametrize("order, turn", [
    ("it", Turn("What?", None, 1)), ("ti", Turn("What?", None, 1, image_last=True)), ("i", Turn("", None, 1)),
    ("iit", Turn("What?", None, 2)), ("tit", Turn("What?What?", None, 1, parts=("What?", "What?"))),
])  # fmt: skip
def test_an_image_stands_where_it_is_among_the_texts(order, turn):
    parts = [say("What?") if kind == "t" else show(Image.new("RGB", (4, 4))) for kind in order]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    asked = limits.read_request(body, limits.ChatRequest, "babbler")
    turns, images = limits.read_dialogue(asked.messages)
    assert turns == [turn] and len(images) == turn.images


def test_text_of_special_tokens_stays_text(server):
    plain = server.ask("</s> <image> ASSISTANT:")
    assert plain["usage"]["prompt_tokens"] == len(prompt_of(server, Turn("</s> <image> ASSISTANT:", None)))
    assert plain["usage"]["prompt_tokens"] > server.ask("a")["usage"]["prompt_tokens"] + 3


def test_stop_texts_end_an_answer_and_are_never_shown(server):
    whole = server.ask("Hello", max_tokens=40)["choices"][0]["message"]["content"]
    stop = whole[15:18]
    choice = server.ask("Hello", max_tokens=40, stop=["never found", stop])["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == whole[: whole.index(stop)]
    assert server.ask("Hello", max_tokens=40, stop=stop)["choices"] == [choice]


@pytest.mark.parametrize("options, most", [
    ({}, 256), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 300}, 300), ({"max_tokens": 4096}, 1024 - 7),
    ({"max_tokens": 3, "max_completion_tokens": 5}, 5),
])  # fmt: skip
def test_both_names_of_the_largest_number_of_tokens(server, options, most):
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]} | options).encode()
    job = prepare_job(limits.read_request(body, limits.ChatRequest, ""), server.engine)
    assert len(job.prompt) == 7 and job.max_tokens == most


def test_a_seed_repeats_an_answer(server):
    drawn = [server.ask("Hi", temperature=1, seed=seed, max_tokens=20)["choices"] for seed in (1, 1, 2)]
    free = [server.ask("Hi", temperature=1, max_tokens=20)["choices"] for _ in range(2)]
    assert drawn[0] == drawn[1] != drawn[2] and free[0] != free[1]


def test_the_official_client(server, world_images):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    content = [say("What is it?"), show(world_images[0])]
    ask = {"model": "babbler", "messages": [{"role": "user", "content": content}], "max_tokens": 9}
    assert [model.id for model in client.models.list()] == ["babbler"]
    whole = client.chat.completions.create(**ask, user="me", metadata={"a": "b"})
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 9
    *chunks, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage
    with client.chat.completions.create(**ask | {"max_tokens": 900}, stream=True) as stream:
        next(iter(stream))  # leaves in the middle of an answer
    assert server.wait_until_empty() == EMPTY
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        client.chat.completions.create(**ask, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError, match="only 'babbler'"):
        client.chat.completions.create(**ask | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask | {"messages": [{"role": "user", "content": "a b " * 2000}]})
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("options, words", [
    ({"temperature": 3}, ["temperature", "2"]), ({"temperature": True}, ["temperature"]), ({"top_p": -1}, ["top_p"]),
    ({"top_k": 0.5}, ["top_k"]), ({"max_tokens": 0}, ["max_tokens"]), ({"max_completion_tokens": 10**6}, ["4096"]),
    ({"seed": -1}, ["seed"]), ({"n": 2}, ["n"]), ({"stop": [""]}, ["stop"]), ({"stop": ["a"] * 5}, ["stop", "4"]),
    ({"stream": 1}, ["stream"]), ({"tools": [1]}, ["'tools'"]), ({"logprobs": True}, ["'logprobs'"]),
    ({"response_format": {"type": "json_object"}}, ["'response_format'"]), ({"frequency_penalty": 1}, ["penalty"]),
    ({"messages": []}, ["messages"]), ({"messages": [{"role": "user"}]}, ["content"]), ({"messages": 3}, ["messages"]),
    ({"messages": [{"role": "robot", "content": "a"}]}, ["role"]),
    ({"messages": [{"role": "assistant", "content": "a"}]}, ["take turns"]),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, ["take turns"]),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}, ["last message"]),
    ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}, ["no place"]),
    ({"messages": [{"role": "user", "content": "a"}] * 101}, ["100"]),
])  # fmt: skip
def test_what_cannot_be_honored_is_refused(server, options, words):
    assert_refused(server.ask("Hello", **options), 400, *words)


@pytest.mark.parametrize("options", [
    {"user": "me", "metadata": {"a": "b"}}, {"tools": None, "logprobs": False, "logit_bias": {}, "top_logprobs": 0},
    {"response_format": {"type": "text"}, "n": 1, "stop": None, "temperature": None, "seed": None},
])  # fmt: skip
def test_what_asks_for_nothing_is_accepted(server, options):
    assert server.ask("Hello", **options)["choices"] == server.ask("Hello")["choices"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": [{"content": "\\ud800"}]}'])
def test_a_body_that_is_no_request(server, body):
    status, text = server.request("POST", PATH, body)
    assert_refused(json.loads(text) | {"status code": status}, 400)


@pytest.mark.parametrize("name", hostile_files())
def test_hostile_images(server, name):
    assert_refused(server.ask([show(hostile_files()[name])]), 400, "image 1: ")


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_images_of_all_other_kinds(server, kind):
    """Or the test above would pass if every image were refused."""
    assert server.ask([show(write(NOISE, kind))])["status code"] == 200


def test_no_address_is_fetched(server):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    for url in (f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", "file:///etc/passwd", "/etc/passwd", "data:,x"):
        assert_refused(server.ask([{"type": "image_url", "image_url": {"url": url}}]), 400, "no address is fetched")
    with pytest.raises(TimeoutError):
        listener.accept()
    assert_refused(server.ask([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}}]), 400, "base64")


def test_sizes(server):
    length = len(prompt_of(server, Turn("a b " * 2000, None)))
    assert_refused(server.ask("a b " * 2000), 400, f"{length:,} tokens", "1,024")
    assert_refused(server.ask([show(Image.new("RGB", (4, 4)))] * 9), 400, "9 images", "8")
    assert_refused(server.ask("a" * 100_001), 400, "100,001 characters")
    for body in (b"a" * 33_554_433, iter([b"a" * 2**20] * 100)):  # with a Content-Length, and in chunks
        status, text = server.request("POST", PATH, body)
        assert_refused(json.loads(text) | {"status code": status}, 413, "33,554,432 bytes")
    assert server.wait_until_empty() == EMPTY


def test_an_answer_ends_with_the_context(server):
    prompt = prompt_of(server, Turn("a b " * 490, None))
    answer = server.ask("a b " * 490, max_tokens=4000)
    assert answer["usage"]["total_tokens"] == 1024 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == text_alone(server, prompt, length=4000)


@pytest.mark.parametrize("headers, words", [
    ({"Host": "evil.example:80"}, "--allow-host"), ({"Host": "127.0.0.1.evil.example"}, "--allow-host"),
    ({"Host": ""}, "--allow-host"),
    ({"Origin": "http://evil.example"}, "other sites"), ({"Origin": "null"}, "other sites"), ({"Host": "["}, ""),
    ({"Host": "localhost", "Origin": "http://localhost:1"}, "other sites"),
])  # fmt: skip
def test_other_sites_are_refused(server, headers, words):
    assert_refused(server.get("/v1/models", **headers), 403, words)
    status, _ = server.request("POST", PATH, b'{"messages": [{"role": "user", "content": "a"}]}', **headers)
    assert status == 403


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:80", "192.168.0.7"])
def test_own_names_are_accepted(server, host):
    assert server.get("/v1/models", Host=host, Origin=f"http://{host}")["status code"] == 200


def test_what_is_not_there(server):
    assert_refused(server.get("/nothing"), 404)
    assert_refused(server.get(PATH), 405)


# ---------------------------------------------------------------------------------------------------------------------
# where it looked


def test_look_shows_the_attention_of_a_word(server):
    """Of a white image, the brightness of each patch is in proportion to its attention, above a floor of 0.2."""
    images = [Image.new("RGB", (72, 72), "white"), Image.new("RGB", (72, 36), "white")]
    content = [*map(show, images), say("Which is red?")]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the left, not the right"}]
    found = server.look(messages, 1)
    assert found["word"] == "left" and found["by"] == "attention"
    maps = [np.asarray(Image.open(BytesIO(limits.decode_url(url)))) for url in found["images"]]
    assert [one.shape for one in maps] == [(448, 448, 3), (224, 448, 3)]
    turn = Turn("Which is red?", "the left, not the right", 2)
    ids = prompt_of(server, turn)
    first = len(prompt_of(server, replace(turn, answer=None)))
    words = find_words(ids[:first], ids[first:], turn.answer, server.tokenizer)
    prepared = [prepare_image(image, server.model.config) for image in images]
    values = attention_map(server.model, Answer(ids, words, prepared))[1].numpy()  # 9 patches of each image
    patches = (np.arange(3) * 448 / 3 + 448 / 6).astype(int)  # centers
    expected = 255 * (0.2 + 0.8 * values / np.maximum(values[:9].max(), values[12:15].max()))
    assert np.abs(maps[0][np.ix_(patches, patches)][..., 0].flatten() - expected[:9]).max() < 1.5
    assert np.abs(maps[1][112, patches, 0] - expected[12:15]).max() < 1.5  # the rows above and below are half padding


@pytest.mark.parametrize("content, answer, word, role", [
    ("Hi", "a b", 0, "assistant"), ("i", "a b", 2, "assistant"), ("i", "a b", -1, "assistant"), ("i", "a b", 0, "user"),
    ("i", "...", 0, "assistant"),
])  # fmt: skip
def test_look_refuses_what_it_cannot_show(server, content, answer, word, role):
    content = [show(Image.new("RGB", (4, 4)))] if content == "i" else content
    messages = [{"role": "user", "content": content}, {"role": role, "content": answer}]
    assert_refused(server.look(messages, word), 400)
    assert server.wait_until_empty() == EMPTY


# ---------------------------------------------------------------------------------------------------------------------
# many clients


def leave_early(server: Server, seconds: float, stream: bool):
    """Ask for a long answer and close the connection after some time."""
    values = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", PATH, json.dumps(values).encode())
    time.sleep(seconds)
    connection.close()


def test_clients_that_leave_free_their_places(server):
    draw, server.pause = random.Random(0), 0.01
    places = [(draw.random() * 0.5, i % 2 == 0) for i in range(30)]  # of 8 rows: most leave while they wait
    threads = [threading.Thread(target=leave_early, args=[server, *place]) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.wait_until_empty(2) == EMPTY  # 900 tokens of 30 requests would take 34 seconds
    server.pause = 0.0
    assert server.engine.cache is None and not server.service.watchers


def test_a_stopped_answer_frees_its_row_within_a_token(server):
    server.pause = 0.3
    values = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", PATH, json.dumps(values).encode())
    response = connection.getresponse()
    for _ in range(6):  # an event and an empty line each: the role, and two tokens
        response.readline()
    (job,) = server.engine.active
    response.close()
    connection.close()
    time.sleep(0.05)
    written = len(job.ids)
    assert server.wait_until_empty() == EMPTY
    server.pause = 0.0
    assert len(job.ids) - written <= 1


def test_too_many_requests_are_refused(babbler):
    server = Server(babbler, rows=1, queue=1, per_client=1)
    try:
        server.pause = 0.05
        for most, text in ((1, "1 of a client"), (9, "2 requests in all")):
            server.service.per_client = most
            threads = [threading.Thread(target=server.ask, args=["Hello"]) for _ in range(min(most, 2))]
            for thread in threads:
                thread.start()
            while server.get("/health")["open"] < len(threads):
                time.sleep(0.01)
            assert_refused(server.ask("Hello"), 429, text)
            for thread in threads:
                thread.join()
        assert server.ask("Hello")["status code"] == 200
    finally:
        server.close()


def test_a_model_that_fails_answers_with_an_error_and_goes_on(server, monkeypatch, capsys):
    def fail(job):
        raise RuntimeError("out of memory")

    for name in ("read_prompt", "choose"):
        with monkeypatch.context() as patch:
            patch.setattr(server.engine, name, fail)
            assert_refused(server.ask("Hello"), 500, "see the server's log")
            _, text = server.request("POST", PATH, b'{"messages": [{"role": "user", "content": "a"}], "stream": true}')
            assert '"type": "server_error"' in text and "[DONE]" not in text
    assert "out of memory" in capsys.readouterr().err
    assert server.ask("Hello")["status code"] == 200 and server.wait_until_empty() == EMPTY


def test_a_decoder_alone_takes_no_images(tiny):
    server = Server(tiny.decoder)
    try:
        assert server.get("/health")["vision"] is False
        assert_refused(server.ask([show(Image.new("RGB", (4, 4)))]), 400, "without a vision tower")
        assert server.ask("a red circle")["status code"] == 200
    finally:
        server.close()


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Run `python -m serve`, which must end with status 2; returns its one line."""

    def call(*argv) -> str:
        monkeypatch.setattr("sys.argv", ["serve", *map(str, argv)])
        with pytest.raises(SystemExit) as caught:
            command.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and line.startswith("serve: ")
        return line

    return call


def test_a_port_that_is_taken(refusal, server):
    assert f"127.0.0.1:{server.port}" in (line := refusal("--model", "x", "--port", server.port)) and "--port" in line


def test_no_model(refusal, tmp_path, monkeypatch):
    assert str(tmp_path) in refusal("--model", tmp_path, "--port", 0)
    monkeypatch.setattr("training.runs.OUTPUT_ROOT", tmp_path)
    assert "no finished run" in refusal("--port", 0)


def test_no_such_host(refusal):
    assert "no.such.host.invalid" in refusal("--model", "x", "--host", "no.such.host.invalid")


def test_a_missing_extra(refusal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert '".[serve]"' in refusal("--model", "x")


def test_a_data_url_may_be_wrapped_in_lines():
    url = data_url(Image.new("RGB", (9, 9)))
    assert limits.decode_url(url[:40] + "\n" + url[40:]) == limits.decode_url(url)
    assert limits.decode_url(url.replace("data:", "DATA:")) == limits.decode_url(url)
