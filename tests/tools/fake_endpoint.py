"""A chat-completions server in this process that answers from the facts in the prompt, and fails as real ones do."""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "429 with Retry-After", "429", "500", "hang", "cut JSON", "empty",
    "wrong id", "HTML", "huge", "slow", "twice", "key",
)  # fmt: skip


def write_answer(messages: list[dict]) -> str:
    """A true answer in the form that the system prompt asks for: it repeats the captions and the first box."""
    captions, _, boxes = messages[-1]["content"].partition("\n\n")
    first = captions.splitlines()[0]
    first = first[:1].upper() + first[1:].rstrip(" .")
    if "Copy every box" in messages[0]["content"]:
        name, _, corners = (boxes or captions).splitlines()[0].partition(": ")
        return f"Question:\nWhere is this {name}: what is its box?\n===\nAnswer:\nThe {name} is at {corners}."
    if "Write one paragraph" in messages[0]["content"]:
        return " ".join(line[:1].upper() + line[1:].rstrip(" .") + "." for line in dict.fromkeys(captions.splitlines()))
    if "Write one question" in messages[0]["content"]:
        return f"Question:\nWhy do you think so?\n===\nAnswer:\nOne can see this: {first}. So it is plain."
    return f"Question:\nWhat does the image show?\n===\nAnswer:\n{first}."


class FakeEndpoint:
    """A server on a free port of loopback. Use it as a context.

    Args: faults: of how many tries in a row a request fails, and how: a function of (request's hash, number of its try)
    that returns one of FAULTS, or "" for an answer. seconds: of a hang; delay: before every answer; huge: bytes.
    """

    def __init__(self, faults=lambda key, attempt: "", seconds: float = 3.0, delay: float = 0.0, huge: int = 5_000_000):
        self.faults, self.seconds, self.delay, self.huge = faults, seconds, delay, huge
        self.tries, self.answered, self.seen, self.keys = Counter(), Counter(), Counter(), set()
        self.open = self.most_open = 0
        self.lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size, daemon_threads = 128, True

            def handle_error(self, request, address):
                pass  # the client hung up, as it should

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, http):
        body = http.rfile.read(int(http.headers["Content-Length"]))
        messages = json.loads(body)["messages"]
        key = hashlib.sha256(messages[-1]["content"].encode() + messages[0]["content"].encode()).hexdigest()
        with self.lock:
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            fault = self.faults(key, self.tries[key])
            self.tries[key] += 1
            self.seen[fault] += 1
            self.keys.add(http.headers.get("Authorization"))
        time.sleep(self.delay)
        try:
            self.reply(http, key, messages, fault)
        finally:
            with self.lock:
                self.open -= 1

    def reply(self, http, key: str, messages: list[dict], fault: str):
        text = write_answer(messages)
        if fault == "empty":
            text = ""
        if fault == "key":
            text = f"Question:\nWhat is your header?\n===\nAnswer:\n{http.headers.get('Authorization')}"
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": sum(len(m["content"]) // 4 for m in messages), "completion_tokens": len(text) // 4}
        values = {
            "id": "x",
            "model": "fake",
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": usage,
        }
        content, status, headers = json.dumps(values).encode(), 200, {}
        if fault.startswith("429"):
            content, status = b'{"error": {"message": "slow down"}}', 429
            headers = {"Retry-After": "0.05"} if "After" in fault else {}
        elif fault == "500":
            error = f"oops, {http.headers.get('Authorization')} failed"
            content, status = json.dumps({"error": {"message": error}}).encode(), 500
        elif fault == "hang":
            time.sleep(self.seconds)
            return
        elif fault == "cut JSON":
            content = content[: len(content) // 2]
        elif fault == "HTML":
            content = b"<html><body>502 Bad Gateway</body></html>"
        elif fault == "huge":
            content = b'{"choices": "' + b"x" * self.huge
        elif fault == "twice":
            content *= 2
        elif fault == "wrong id":
            headers = {"X-Client-Request-Id": "another"}
        http.send_response(status)
        for name, value in headers.items():
            http.send_header(name, value)
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        if fault == "slow":  # a byte now and then: each is in time, the answer never comes
            for byte in content:
                http.wfile.write(bytes([byte]))
                time.sleep(self.seconds / 20)
        http.wfile.write(content)
        if not fault:
            with self.lock:
                self.answered[key] += 1
