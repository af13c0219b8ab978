"""Load a server with many users, clients that leave, and hostile files, and print what came of it.

    python tests/tools/serve_load.py --model out/speedrun/stage2 --world out/speedrun/world
    python tests/tools/serve_load.py --model DIR --world DIR --only users --seconds 30

users      20 users ask for two minutes: lost answers, answers unlike those of llava.generate alone, latency
leaving    200 clients leave at random times: rows still taken, and the server's memory before and after
hostile    the files of tests/serve/hostile.py and a request of 100 MB: status of each answer

The server is `python -m serve` in a process of its own. Questions and images are held-out ones of the embedded world.
"""

import base64
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/serve")]

from hostile import hostile_files  # noqa: E402
from local_server import say, show  # noqa: E402

from data import load_image, render_dialogue  # noqa: E402
from formats.weights import load_checkpoint  # noqa: E402
from inputs import cli  # noqa: E402
from inputs.records import Turn  # noqa: E402
from llava import generate  # noqa: E402

PATH, USERS, LEAVING = "/v1/chat/completions", 20, 200


class Server:
    """`python -m serve` on a free port."""

    def __init__(self, model: Path):
        command = [sys.executable, "-m", "serve", "--model", model.resolve(), "--port", "0"]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        line = self.process.stderr.readline()
        if not (found := re.search(r"http://127.0.0.1:(\d+)", line)):
            raise ValueError(f"the server did not start: {line.strip()}")
        self.port = int(found[1])
        self.log = threading.Thread(target=lambda: sys.stderr.writelines(self.process.stderr))
        self.log.start()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def health(self) -> dict:
        connection = self.connect()
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    def wait_until_empty(self) -> float:
        """Wait until no request is open; returns the seconds that it took."""
        begin = time.monotonic()
        while any(self.health()[name] for name in ("open", "active", "waiting")) and time.monotonic() - begin < 60:
            time.sleep(0.05)
        return time.monotonic() - begin

    def memory(self) -> float:
        """MB of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.log.join()


def make_requests(world: Path, count: int) -> list[dict]:
    """Bodies of different requests: an image or none, different lengths, half of them greedy."""
    draw, rows = random.Random(0), [json.loads(line) for line in (world / "questions.jsonl").open()]
    bodies = []
    for i, row in enumerate(draw.sample(rows, count)):
        file = (world / row["image"]).read_bytes()
        content = [show(file), say(row["text"])] if i % 4 else [say(row["text"])]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": draw.choice([8, 64, 200])}
        body |= {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": i} if i % 2 else {}
        bodies.append(body | {"stream": i % 3 > 0, "image": row["image"] if i % 4 else None, "text": row["text"]})
    return bodies


def answer_alone(body: dict, world: Path, model, tokenizer) -> str:
    """The answer that llava.generate gives, which knows nothing of the server."""
    images, features = [load_image(world, body["image"], model.config)] if body["image"] else [], None
    turn = Turn(body["text"], None, len(images))
    prompt, _ = render_dialogue([turn], tokenizer, model.config.template, [image.tokens for image in images])
    with torch.inference_mode():
        if images:
            features = model.vision_features(images[0].pixels)
        sampling = {name: body[name] for name in ("temperature", "top_p", "top_k") if name in body}
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        answer = generate(model, [prompt], features, None, body["max_tokens"], generator=generator, **sampling)
        ids = [i for (i,) in answer]
    return tokenizer.decode(ids).lstrip()


def ask(server: Server, body: dict) -> tuple[int, str, float, float]:
    """Status, text, and seconds to the first and to the last piece."""
    values = {name: value for name, value in body.items() if name not in ("image", "text")}
    begin, connection = time.monotonic(), server.connect()
    connection.request("POST", PATH, json.dumps(values).encode())
    response = connection.getresponse()
    if not body["stream"]:
        answer, seconds = json.loads(response.read()), time.monotonic() - begin
        text = answer["choices"][0]["message"]["content"] if response.status == 200 else ""
        return response.status, text, seconds, seconds
    text, first = "", 0.0
    for line in response:
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            first = first or (time.monotonic() - begin if piece else 0.0)
            text += piece
    return response.status, text, first, time.monotonic() - begin


def run_users(server: Server, world: Path, model_folder: Path, seconds: float):
    """Let USERS ask at the same time, without a pause between an answer and the next question."""
    model, tokenizer = load_checkpoint(model_folder, "cpu", torch.float32)
    bodies = make_requests(world, 60)
    alone = [answer_alone(body, world, model, tokenizer) for body in tqdm(bodies, "alone", leave=False)]
    results, end, most = [], time.monotonic() + seconds, []

    def use(number: int):
        draw = random.Random(number)
        while time.monotonic() < end:
            i = draw.randrange(len(bodies))
            try:
                results.append((i, *ask(server, bodies[i])))
            except (OSError, http.client.HTTPException) as error:
                results.append((i, 0, str(error), 0.0, 0.0))

    threads = [threading.Thread(target=use, args=[number]) for number in range(USERS)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        most.append(server.health()["active"])
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    lost = sum(status != 200 for _, status, *_ in results)
    other = sum(text != alone[i] for i, status, text, *_ in results if status == 200)
    firsts, lasts = [r[3] for r in results if bodies[r[0]]["stream"]], [r[4] for r in results]
    print(f"users: {USERS} for {seconds:.0f} s, {len(results)} answers, {lost} lost, {other} unlike those given alone")
    print(f"  rows in use: {statistics.mean(most):.1f} on average, {max(most)} at most")
    for name, values in (("first piece of a stream", firsts), ("whole answer", lasts)):
        median, late = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        print(f"  {name}: median {median:.2f} s, 95th percentile {late:.2f} s")


def run_leaving(server: Server, world: Path):
    """Let clients leave at random times of up to half a second, ten at a time."""
    bodies, draw = make_requests(world, 60), random.Random(1)
    for body in bodies:
        body |= {"max_tokens": 900}

    def leave(body: dict, seconds: float):
        connection = server.connect()
        connection.request("POST", PATH, json.dumps({k: body[k] for k in body if k not in ("image", "text")}).encode())
        time.sleep(seconds)
        connection.close()

    def leave_all(count: int):
        for _ in tqdm(range(count // 10), "leaving", leave=False):
            places = [(draw.choice(bodies), draw.random() / 2) for _ in range(10)]
            threads = [threading.Thread(target=leave, args=place) for place in places]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    leave_all(LEAVING)  # the first round fills the allocator's pools
    server.wait_until_empty()
    before = server.memory()
    leave_all(LEAVING)
    seconds, health = server.wait_until_empty(), server.health()
    counts = ", ".join(f"{health[name]} {name}" for name in ("open", "active", "waiting"))
    print(f"leaving: {LEAVING} clients, then {counts} after {seconds:.2f} s")
    print(f"  memory: {before:.1f} MB after the first {LEAVING}, {server.memory():.1f} MB after as many more")


def run_hostile(server: Server):
    """Send what must be refused."""
    statuses = Counter()
    for name, file in hostile_files().items():
        connection = server.connect()
        body = {"messages": [{"role": "user", "content": [show(file)]}]}
        connection.request("POST", PATH, json.dumps(body).encode())
        response = connection.getresponse()
        message = json.loads(response.read())["error"]["message"]
        statuses[response.status] += 1
        if len(message.splitlines()) != 1:
            print(f"  {name}: {message!r}")
    print(f"hostile: {sum(statuses.values())} files, answers by status: {dict(statuses)}")
    connection, url = server.connect(), "data:image/png;base64," + base64.b64encode(bytes(100_000_000)).decode()
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    connection.request("POST", PATH, json.dumps(body).encode())
    response = connection.getresponse()
    print(f"  a request of 133 MB: {response.status} {json.loads(response.read())['error']['message']}")
    print(f"  the server goes on: {server.health()['status']}")


def main():
    """Start a server, do what --only says, and stop it."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model of the embedded world")
    parser.add_argument("--world", type=Path, required=True, help="folder of the world, for its held-out questions")
    parser.add_argument("--only", choices=("users", "leaving", "hostile"), help="default: all three")
    parser.add_argument("--seconds", type=float, default=120, help="of users")
    args = parser.parse_args()
    server = Server(args.model)
    try:
        if args.only in (None, "users"):
            run_users(server, args.world, args.model, args.seconds)
        if args.only in (None, "leaving"):
            run_leaving(server, args.world)
        if args.only in (None, "hostile"):
            run_hostile(server)
    finally:
        server.close()


if __name__ == "__main__":
    cli.run(main, "serve_load.py")
