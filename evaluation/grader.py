"""MM-Vet and LLaVA-Bench, whose free answers a language model grades.

Any endpoint that speaks OpenAI's /chat/completions can grade (--grader http://HOST/v1). Its replies are kept in a file
of grades, one line each (--grades FILE). Scores are computed from that file alone, without the network.

Published scores come from GPT-4 of 2023 and the official prompts, which --rule reads from their published files.
Without --rule the prompts are our own: good to compare models with each other, not with papers.
"""

import hashlib
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from evaluation.predictions import Item, JsonFile, Row, group, read_text, short
from evaluation.scores import mean
from inputs.files import read_complete_lines
from inputs.records import DataError

CORRECTNESS = """You grade answers to questions about an image. Below are a question, the true answer and a given \
answer. Where the true answer has parts joined by <AND>, all are needed; joined by <OR>, any one is enough. Reply with \
one number between 0.0 (wrong) and 1.0 (right), in steps of 0.1, and nothing else.

"""
COMPARISON = """Above are a description of an image, a question about it, and the answers of two assistants. Rate \
each answer for how helpful, relevant, correct and detailed it is, from 1 to 10, whichever comes first. Reply \
with a first line that holds the two numbers only, assistant 1 first, separated by a space; then explain."""

Grades = dict[str, tuple[float, ...] | None]  # by item id; None if the reply cannot be read


def mmvet_request(item: Item, answer: str, rule: object) -> str:
    """A prompt for one grade, a number in [0, 1]. Args: rule: the official few-shot prompt, as text."""
    truth = item.truth[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    if rule is not None:
        return f"{rule}\n{item.text} | {truth} | {answer} | "
    return f"{CORRECTNESS}Question: {item.text}\nTrue answer: {truth}\nGiven answer: {answer}\nGrade:"


def llavabench_request(item: Item, answer: str, rule: object) -> str:
    """A prompt for two grades, first of GPT-4's reference answer. Args: rule: LLaVA's rule.json."""
    caption, reference = item.truth
    prompt, role = COMPARISON, "Assistant"
    if rule is not None:
        key = f"llava_bench_{item.groups.get('category')}"
        if not isinstance(rule, dict) or not isinstance(rule.get(key), dict):
            raise DataError(f"question {item.id}: --rule has no {key}")
        prompt, role = map(Row(rule[key], f"--rule: {key}").need, ("prompt", "role"))
    text = f"[Context]\n{caption}\n\n[Question]\n{item.text}\n\n"
    text += "".join(f"[{role} {n}]\n{value}\n\n[End of {role} {n}]\n\n" for n, value in ((1, reference), (2, answer)))
    return f"{text}[System]\n{prompt}\n\n"


REQUESTS = {"mmvet": mmvet_request, "llavabench": llavabench_request}  # (item, answer, rule) to a prompt
MAX_TOKENS = {"mmvet": 8, "llavabench": 1024}  # of a reply


def read_rule(path: Path | None) -> object:
    """The official prompt: the content of LLaVA-Bench's rule.json, or the text of a file for MM-Vet."""
    if path is None:
        return None
    return JsonFile(path).content if path.suffix == ".json" else read_text(path)


def build_requests(task: str, items: list[Item], answers: list[str | None], rule: object, model: str) -> list[dict]:
    """A request for each answer, in the form of OpenAI's batch files. Raises DataError if an item has no truth."""
    lines = []
    for item, answer in zip(items, answers):
        if item.truth is None:
            files = "mm-vet.json" if task == "mmvet" else "context.jsonl and answers_gpt4.jsonl"
            raise DataError(f"question {short(item.id)}: no answer to compare with, {files} must have it")
        if answer is not None:
            body = {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS[task]}
            body["messages"] = [{"role": "user", "content": REQUESTS[task](item, answer, rule)}]
            lines.append({"custom_id": str(item.id), "method": "POST", "url": "/v1/chat/completions", "body": body})
    return lines


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: urllib would follow it to any host and send the API key along."""

    def redirect_request(self, *_):
        return None


def request_reply(address: str, body: dict, timeout: float = 120) -> str:
    """The reply of a chat completion endpoint. The API key, if needed, is in OPENAI_API_KEY. Raises ValueError."""
    headers, key = {"Content-Type": "application/json"}, os.environ.get("OPENAI_API_KEY")
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    url = address.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except (OSError, http.client.HTTPException) as error:  # OSError: urllib's errors and timeouts are its subclasses
        raise ValueError(f"{url}: {str(error) or repr(error)}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url}: the reply is not a chat completion ({error!r})") from None


def read_grades(path: Path) -> list[dict]:
    """The rows of a file of grades. Removes an incomplete last line, left by a kill, from the file."""
    whole, rows = read_complete_lines(path), []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(Row(json.loads(line), ""))
            for key in ("id", "grader", "asked", "reply"):
                rows[-1].need(key)
        except ValueError:
            raise DataError(f"{path}: line {number}: is not a grade") from None
    if path.exists():
        os.truncate(path, len(whole))
    return rows


def collect_grades(task: str, lines: list[dict], path: Path, send: Callable[[dict], str] | None) -> Grades:
    """The grade of each request, from the replies in a file. Missing ones are requested by `send` and appended to it.

    A reply belongs to the hash of its request: if the answer, the prompt or the grader changes, it is requested again.
    Raises DataError if the file has replies for these questions, but all of them to other requests.
    """
    rows, grades = read_grades(path), {}
    replies = {row["asked"]: row["reply"] for row in rows}
    for line in tqdm(lines, unit="grade", disable=send is None):
        key, text = line["custom_id"], json.dumps(line["body"], sort_keys=True)
        asked = hashlib.sha256(text.encode()).hexdigest()[:16]
        if send and asked not in replies:
            replies[asked] = send(line["body"])
            row = {"id": key, "grader": line["body"]["model"], "asked": asked, "reply": replies[asked]}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if asked in replies:
            grades[key] = {"mmvet": read_correctness, "llavabench": read_pair}[task](replies[asked])
    asked_ids = {line["custom_id"] for line in lines}
    if not grades and (graders := sorted({short(row["grader"]) for row in rows if row["id"] in asked_ids})):
        reason = f"its grades, by {', '.join(graders)}, are of other answers, or --grader-model or --rule is another"
        raise DataError(f"{path}: {reason}")
    return grades


def read_correctness(reply: str) -> tuple[float] | None:
    """A number in [0, 1] as the first word of the reply (mm-vet_evaluator.py); None if there is none."""
    match = re.match(r"\s*(\d*\.?\d+)(?:\s|$)", reply)
    value = float(match[1]) if match else -1.0
    return (value,) if 0 <= value <= 1 else None


def read_pair(reply: str) -> tuple[float, float] | None:
    """Two numbers from 1 to 10 in the first line, commas allowed (eval_gpt_review_bench.py); None if there are none."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    try:
        one, two = map(float, words)
    except ValueError:
        return None
    return (one, two) if 1 <= one <= 10 and 1 <= two <= 10 else None


def score_mmvet(items: list[Item], grades: Grades) -> dict[str, float]:
    """100 x the mean grade, in total, by skill, and by combination of skills; an answer without a grade gets 0."""
    pairs = []
    for item in items:
        value, skills = (grades.get(str(item.id)) or (0.0,))[0], item.truth[1]
        pairs += [(name, value) for name in dict.fromkeys(("total", *skills, "_".join(skills) or "total"))]
    return {name: mean(values) for name, values in group(pairs).items()}


def score_llavabench(items: list[Item], grades: Grades) -> dict[str, float]:
    """100 x the sum of the answers' grades / the sum of the references', in total and by category
    (summarize_gpt_review.py). An answer without a grade gets the lowest, 1, against a reference with 10."""
    names = [(name, item) for item in items for name in dict.fromkeys(("all", item.groups.get("category", "all")))]
    groups = group((name, grades.get(str(item.id)) or (10.0, 1.0)) for name, item in names)
    return {name: 100 * sum(own for _, own in rows) / sum(other for other, _ in rows) for name, rows in groups.items()}


SCORES = {"mmvet": score_mmvet, "llavabench": score_llavabench}


def require_grades(items: list[Item], answers: list[str | None]) -> dict[str, float]:
    """Raises DataError: answers alone give no score. Stands in the table of tasks where others have a scorer."""
    raise DataError(f"{short(items[0].id)} and the others are graded by a language model: --grades FILE, see grader.py")
