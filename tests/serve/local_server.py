"""A server in this process, and a few ways to ask it."""

import base64
import http.client
import json
import socket
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from formats.weights import load_model
from inputs.tokenizer import Tokenizer
from serve.engine import Engine

PNG = "data:image/png;base64,"


class Server:
    """A server on a free port of loopback. `pause`: seconds added to every step of the engine."""

    def __init__(self, folder: Path, **limits):
        uvicorn = pytest.importorskip("uvicorn")
        pytest.importorskip("fastapi")
        from serve.app import Service, make_app

        self.model, self.tokenizer, self.pause = load_model(folder), Tokenizer.load(folder), 0.0
        self.engine = Engine(self.model, self.tokenizer, limits.pop("rows", 8))
        step = self.engine.step
        self.engine.step = lambda: (time.sleep(self.pause), step())
        limits = {"queue": 32, "per_client": 32, "hosts": {"localhost"}} | limits
        self.service = Service(self.engine, "babbler", **limits)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(make_app(self.service), log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=[[listener]])
        self.thread.start()

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join()
        self.engine.close()

    def request(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def get(self, path: str, **headers) -> dict:
        status, text = self.request("GET", path, **headers)
        return json.loads(text) | {"status code": status}

    def ask(self, content, **options) -> dict:
        """The completion, or the error, of one question."""
        values = {"messages": [{"role": "user", "content": content}], "max_tokens": 12} | options
        status, text = self.request("POST", "/v1/chat/completions", json.dumps(values).encode())
        return json.loads(text) | {"status code": status}

    def look(self, messages: list[dict], word: int) -> dict:
        status, text = self.request("POST", "/look", json.dumps({"messages": messages, "word": word}).encode())
        return json.loads(text) | {"status code": status}

    def wait_until_empty(self, seconds: float = 20):
        """Wait until no request is open; returns the counts of /health."""
        end = time.monotonic() + seconds
        while (counts := {name: self.get("/health")[name] for name in EMPTY}) != EMPTY and time.monotonic() < end:
            time.sleep(0.01)
        return counts


EMPTY = {"open": 0, "active": 0, "waiting": 0}


def data_url(image: Image.Image | bytes) -> str:
    """An image, or the bytes of a file, as a data URL."""
    if not isinstance(image, bytes):
        file = BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return PNG + base64.b64encode(image).decode()


def show(image) -> dict:
    """The part of a message that shows an image."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def say(text: str) -> dict:
    return {"type": "text", "text": text}
