"""Ask an OpenAI-compatible address (POST URL/chat/completions), many requests at a time, as a paid call should be made.

    an answer             is checked, and stored before anything else is done
    429 and Retry-After   nobody asks before the time is over; without the header, waits double from FIRST_WAIT
    500, hang, half JSON  the request is asked again, up to `tries` times
    401, 403, 404, 402    nothing will be answered: no new request is sent, those on the way are waited for
    Ctrl-C                likewise

The key is sent in the header Authorization to this address alone. Redirects are not followed.
"""

import email.utils
import http.client
import json
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tqdm import tqdm

from datagen.asking import Request
from datagen.store import scrub

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds, between two tries
LONGEST_PAUSE = 600.0  # a Retry-After beyond it ends the run
MOST_BYTES = 4_000_000  # of an answer
FATAL = {401: "the key is refused", 402: "the account has no credit", 403: "the key has no right to this", 404: ""}
HOPELESS = {400, 413, 422}  # statuses of a request that will never be answered
GIVEN_UP = 20  # requests given up in a row end the run
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Stop(Exception):
    """Nothing more will be answered; one line."""


class BadAnswer(Exception):
    """An answer that cannot be used, or none; one line. Args: wait: seconds the server asks for, None if it does not
    say; final: no use to ask again."""

    def __init__(self, message: str, wait: float | None = None, final: bool = False):
        super().__init__(" ".join(message.split())[:300])
        self.wait, self.final = wait, final


@dataclass
class Endpoint:
    """An address. Raises ValueError if it cannot be one.

    Args: url: up to /v1; model: name sent with each request; key: "" for none; options: more fields of the body;
    timeout: seconds of one call, all of it; tries: of one request; per_minute: most calls a minute, 0 for no limit.
    """

    url: str
    model: str
    key: str = ""
    options: dict = field(default_factory=dict)
    timeout: float = 120.0
    tries: int = 8
    per_minute: float = 0.0

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"--endpoint {self.url!r:.80}: not an address such as https://host/v1")
        if parts.username or parts.password:
            raise ValueError("--endpoint: holds a user name or password; a key is read from the environment only")
        if self.key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError(f"--endpoint {self.url}: the key would be sent unencrypted; use https")
        if self.key and not re.fullmatch(r"[!-~]{12,}", self.key):
            raise ValueError("the key is shorter than 12 characters, or holds blanks: unset it where none is needed")
        self.host, self.port, self.https = parts.hostname, parts.port, parts.scheme == "https"
        self.path = parts.path.rstrip("/") + "/chat/completions"
        self.tls = ssl.create_default_context() if self.https else None
        self.lock, self.free_at, self.spent, self.answered = threading.Lock(), 0.0, Counter(), 0

    # -- one call ------------------------------------------------------------------------------------------------------

    def call(self, request: Request) -> dict:
        """One call; returns a row for answers.jsonl. Raises BadAnswer or Stop."""
        body = json.dumps(request.body(self.model, self.options)).encode()
        headers = {"Content-Type": "application/json", "X-Client-Request-Id": request.id, "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            status, answered, content = self.post(body, headers)
        except (OSError, http.client.HTTPException) as error:  # refused, reset, hung, cut, no such host
            reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise BadAnswer(reason) from None
        text = content.decode(errors="replace")
        if status != 200:
            raise self.refused(status, answered, scrub(text, self.key))
        if (named := answered.get("X-Client-Request-Id")) and named != request.id:
            raise BadAnswer("an answer to another request")
        return self.read(request, text)

    def post(self, body: bytes, headers: dict) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and content. A timer closes the connection, so that a slow answer ends as a hung one does."""
        kind = http.client.HTTPSConnection if self.https else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout, **({"context": self.tls} if self.https else {}))
        late, sockets = threading.Event(), []

        def hang_up():
            late.set()
            for one in sockets:  # kept, as http.client forgets its own when the server will close the connection
                with suppress(OSError):  # ended in the meantime
                    one.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, hang_up)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)
            if not late.is_set():
                connection.request("POST", self.path, body, headers)
                response = connection.getresponse()
                content = response.read(MOST_BYTES + 1)
            if late.is_set():  # closed before the end
                raise TimeoutError
            if len(content) > MOST_BYTES:
                raise BadAnswer(f"an answer of more than {MOST_BYTES:,} bytes")
            return response.status, response.headers, content
        except (OSError, ValueError, http.client.HTTPException):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            connection.close()

    def refused(self, status: int, headers: http.client.HTTPMessage, text: str) -> Exception:
        """The exception for an answer with another status than 200."""
        try:
            error = json.loads(text).get("error")
            message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
        except (ValueError, AttributeError):
            message, code = None, None
        line = f"status {status}" + (f": {message}" if isinstance(message, str) else "")
        if status in FATAL or code == "insufficient_quota" or 300 <= status < 400:
            reason = FATAL.get(status) or ("no such address or model" if status == 404 else "")
            return Stop(" ".join(f"{line}{f' ({reason})' if reason else ''}".split())[:300])
        wait = retry_after(headers) if status in (429, 503) else None
        if wait is not None and wait > LONGEST_PAUSE:
            return Stop(f"{line}: it asks to wait {wait:,.0f} s; run the same command then")
        return BadAnswer(line, wait, final=status in HOPELESS)

    def read(self, request: Request, text: str) -> dict:
        """The row of a whole answer. Tokens are counted even if the text is of no use, as they are paid for."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise BadAnswer("not JSON: cut, or a web page") from None
        row = read_completion(request.id, values)
        if self.key and self.key in json.dumps(row, ensure_ascii=False):  # never kept
            raise BadAnswer("the answer repeats the key")
        with self.lock:
            self.spent.update({"input": row["input_tokens"], "output": row["output_tokens"], "calls": 1})
        if not row["text"].strip():
            raise BadAnswer("an empty text")
        return row

    # -- one request ---------------------------------------------------------------------------------------------------

    def ask(self, request: Request, stopped: threading.Event) -> dict | None:
        """The row for answers.jsonl, after as many tries as are needed. Raises BadAnswer with the last reason if there
        were too many, Stop if nothing will be answered. None if stopped while it waited."""
        wait = FIRST_WAIT
        for attempt in range(1, self.tries + 1):
            if not self.wait_turn(stopped):
                return None
            try:
                row = self.call(request) | {"tries": attempt}
            except BadAnswer as error:
                if error.final or attempt == self.tries:
                    raise
                if not self.answered and attempt >= 3 and is_unreachable(str(error)):
                    raise Stop(str(error)) from None
                pause = min(wait, LONGEST_WAIT) * random.uniform(0.5, 1.0) if error.wait is None else error.wait
                if error.wait is not None:  # all wait, not this request alone
                    with self.lock:
                        self.free_at = max(self.free_at, time.monotonic() + pause)
                elif stopped.wait(pause):
                    return None
                wait *= 2
            else:
                with self.lock:
                    self.answered += 1
                return row

    def wait_turn(self, stopped: threading.Event) -> bool:
        """Wait until a call is allowed; False if stopped meanwhile."""
        while True:
            with self.lock:
                now = time.monotonic()
                if now >= self.free_at:
                    self.free_at = now + (60 / self.per_minute if self.per_minute else 0)
                    return not stopped.is_set()
                pause = self.free_at - now
            if stopped.wait(min(pause, 1.0)):
                return False


def read_completion(key: str, values: object) -> dict:
    """A row of answers.jsonl from the body of a chat completion. Raises BadAnswer."""
    try:
        choice, usage = values["choices"][0], values.get("usage") or {}
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        error = values.get("error") if isinstance(values, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        raise BadAnswer(f"no completion: {message}" if message else "JSON of another form") from None
    model = values.get("model")
    row = {"custom_id": key, "text": text if isinstance(text, str) else "", "finish_reason": finish}
    return row | {"model": model, "input_tokens": tokens[0], "output_tokens": tokens[1]}


def is_unreachable(reason: str) -> bool:
    return any(part in reason for part in ("refused", "Name or service", "name resolution", "unreachable", "SSL"))


def retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds of the header Retry-After, which holds seconds or a date; None without it."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# many requests


def ask_all(
    endpoint: Endpoint,
    requests: list[Request],
    workers: int,
    keep: Callable[[dict], None],
    fail: Callable[[dict], None],
) -> str:
    """Ask all requests, `workers` at a time. Returns why it ended early, "" if it did not.

    Args: keep: called with each answer's row as soon as it is there, fail: with {"custom_id", "reason"}; both from
    several threads. Whatever ends the run, requests on the way are waited for, as they are paid for.
    """
    stopped, todo, lock, reasons, row_of_failures = threading.Event(), iter(requests), threading.Lock(), [], [0]
    bar = tqdm(total=len(requests), unit="answer", disable=not sys.stderr.isatty())

    def stop(reason: str):
        reasons.append(reason)
        stopped.set()

    def work():
        while not stopped.is_set():
            with lock:
                request = next(todo, None)
            if request is None:
                return
            try:
                row = endpoint.ask(request, stopped)
                if row:
                    keep(row)
                    row_of_failures[0] = 0
            except BadAnswer as error:
                reason = scrub(str(error), endpoint.key)
                fail({"custom_id": request.id, "reason": reason})
                row_of_failures[0] += 1
                if row_of_failures[0] >= GIVEN_UP:
                    stop(f"{GIVEN_UP} requests in a row were given up, the last one because: {reason}")
            except Stop as error:
                stop(scrub(str(error), endpoint.key))
            except Exception as error:  # a full disk, a fault of ours: no more paid calls
                stop(f"{type(error).__name__}: {scrub(str(error), endpoint.key)}")
            bar.update()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(requests))))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.1)
    except KeyboardInterrupt:
        stop("interrupted")
        print("\nwaiting for the answers on the way; Ctrl-C again leaves them", file=sys.stderr)
        for thread in threads:
            thread.join()
    bar.close()
    return reasons[0] if reasons else ""
