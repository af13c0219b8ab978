"""MM-Vet and LLaVA-Bench, whose free answers a language model grades.

Which one is up to whoever runs this: any endpoint that speaks OpenAI's /chat/completions, by its address. What it says
is kept in a file of grades, one line each; figures are made of that file alone, without the network:

    python eval.py --score mmvet --predictions P --references mm-vet.json --grades G.jsonl --grader http://HOST/v1
    python eval.py --score mmvet --predictions P --references mm-vet.json --grades G.jsonl

The official figures are GPT-4's of 2023, under the words of the official prompts; --rule takes those from their
published files. Without it the grader is asked in words of our own: good for comparing models, not with papers.
"""

import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from evaluation.predictions import Item, by_id, entries, is_llava, llava_items, load, shown, want
from inputs.files import read_complete_lines
from inputs.records import DataError

CORRECTNESS = """You grade answers to questions about a picture. Below are a question, the true answer and a given \
answer. Where the true answer has parts joined by <AND>, all are needed; joined by <OR>, any one is enough. Reply with \
one number between 0.0 (wrong) and 1.0 (right), in steps of 0.1, and nothing else.

"""
COMPARISON = """Above are a description of a picture, a question about it, and the answers of two assistants. Rate \
each answer for how helpful, relevant, correct and detailed it is, from 1 to 10, whichever comes first. Reply \
with a first line that holds the two numbers only, assistant 1 first, separated by a space; then explain."""


# ---------------------------------------------------------------------------------------------------------------------
# what is published


def read_mmvet(paths: list[Path]) -> list[Item]:
    """mm-vet.json: {"v1_0": {"imagename", "question", "answer", "capability": [...]}}; LLaVA's list says 0 for v1_0."""
    items = []
    for path in paths:
        content = load(path)
        if is_llava(content):
            items += llava_items(path, content)
            continue
        for key, where, row in by_id(path, content):
            skills = sorted(map(str, want(row, "capability", list, where)))
            item = Item(key, want(row, "question", str, where), want(row, "imagename", str, where))
            item.truth, item.keys = (want(row, "answer", str, where), skills), (key.removeprefix("v1_"),)
            items.append(item)
    return items


def read_llavabench(paths: list[Path]) -> list[Item]:
    """questions.jsonl, context.jsonl (a caption of each picture) and answers_gpt4.jsonl, in any order."""
    asked, captions, answers = [], {}, {}
    for path in paths:
        for where, row in entries(path, load(path)):
            if "caption" in row:
                text = row["caption"]
                captions[want(row, "image", str, where)] = "\n".join(text) if isinstance(text, list) else str(text)
            elif "answer_id" in row:
                answers[str(want(row, "question_id", (int, str), where))] = want(row, "text", str, where)
            else:
                key, text = want(row, "question_id", (int, str), where), want(row, "text", str, where)
                groups = {"category": want(row, "category", str, where)}
                asked.append(Item(key, text, want(row, "image", str, where), groups=groups))
    for item in asked:
        caption, answer = captions.get(item.image), answers.get(str(item.id))
        item.truth = (caption, answer) if caption is not None and answer is not None else None
    return asked


# ---------------------------------------------------------------------------------------------------------------------
# what the grader is asked


def truth_of(item: Item) -> tuple:
    """MM-Vet's answer and skills. Raises DataError where only LLaVA's list was given, which has neither."""
    if item.truth is None:
        raise DataError(f"question {shown(item.id)}: no answer to compare with in the files, mm-vet.json has it")
    return item.truth


def mmvet_request(item: Item, answer: str, rule: object) -> list[dict]:
    """Messages that ask for one grade, a number in [0, 1]. Args: rule: the official few-shot prompt, as text."""
    truth = truth_of(item)[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    if rule is not None:
        return [{"role": "user", "content": f"{rule}\n" + " | ".join([item.text, truth, answer, ""])}]
    text = f"{CORRECTNESS}Question: {item.text}\nTrue answer: {truth}\nGiven answer: {answer}\nGrade:"
    return [{"role": "user", "content": text}]


def llavabench_request(item: Item, answer: str, rule: object) -> list[dict]:
    """Messages that ask for two grades, GPT-4's reference answer first. Args: rule: LLaVA's rule.json."""
    if item.truth is None:
        raise DataError(f"question {item.id}: context.jsonl or answers_gpt4.jsonl has nothing for it")
    caption, reference = item.truth
    prompt, role = COMPARISON, "Assistant"
    if rule is not None:
        key = f"llava_bench_{item.groups['category']}"
        if not isinstance(rule, dict) or not isinstance(rule.get(key), dict):
            raise DataError(f"question {item.id}: --rule has no {key}")
        prompt, role = (want(rule[key], name, str, f"--rule: {key}") for name in ("prompt", "role"))
    parts = [("Context", caption), ("Question", item.text)]
    text = "".join(f"[{name}]\n{value}\n\n" for name, value in parts)
    text += "".join(f"[{role} {n}]\n{value}\n\n[End of {role} {n}]\n\n" for n, value in ((1, reference), (2, answer)))
    return [{"role": "user", "content": f"{text}[System]\n{prompt}\n\n"}]


REQUESTS = {"mmvet": mmvet_request, "llavabench": llavabench_request}
TOKENS = {"mmvet": 8, "llavabench": 1024}  # longest reply


def read_rule(path: Path | None) -> object:
    """The official prompt: rule.json of LLaVA-Bench, or a text file for MM-Vet."""
    if path is None:
        return None
    return load(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")


def requests(task: str, items: list[Item], answers: list[str | None], rule: object, model: str) -> list[dict]:
    """A line for each answer in the form of OpenAI's batches: what --submission writes for other graders."""
    lines = []
    for item, answer in zip(items, answers):
        if answer is not None:
            messages = REQUESTS[task](item, answer, rule)
            body = {"model": model, "temperature": 0, "max_tokens": TOKENS[task], "messages": messages}
            lines.append({"custom_id": str(item.id), "method": "POST", "url": "/v1/chat/completions", "body": body})
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# what it says


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would follow it, to any host, and take the key along."""

    def redirect_request(self, *_):
        return None


def ask(address: str, body: dict, timeout: float = 120) -> str:
    """The reply of an endpoint; its key, if it wants one, is in OPENAI_API_KEY. Raises ValueError with the reason."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = address.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except (urllib.error.URLError, TimeoutError, OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: {str(error) or repr(error)}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url}: replied something else than a chat completion ({error!r})") from None


def grade(lines: list[dict], path: Path, send: Callable[[dict], str]):
    """Ask for every grade that the file does not hold yet, and add each to it as soon as it is there.

    A grade goes with what was asked: once an answer, the prompt or the grader is another, it is asked for again.
    """
    known = {row["asked"] for row in read_grades(path)}
    with path.open("a", encoding="utf-8") as file:
        for line in tqdm(lines, unit="grade"):
            if (asked := fingerprint(line)) not in known:
                row = {"id": line["custom_id"], "grader": line["body"]["model"], "asked": asked}
                file.write(json.dumps(row | {"reply": send(line["body"])}) + "\n")
                file.flush()


def fingerprint(line: dict) -> str:
    return hashlib.sha256(json.dumps(line["body"], sort_keys=True).encode()).hexdigest()[:16]


def read_grades(path: Path) -> list[dict]:
    """The lines of a file of grades; a last one cut short by a kill is dropped from it."""
    if not path.exists():
        return []
    whole, rows = read_complete_lines(path), []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("id", "grader", "asked", "reply")})
            if not all(isinstance(value, str) for value in rows[-1].values()):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: line {number}: is not a grade") from None
    os.truncate(path, len(whole))
    return rows


def graded(items: list[Item], lines: list[dict], path: Path, task: str) -> dict[str, tuple[float, ...] | None]:
    """What each item's grade says, by id; None where there is none, or none that can be read, which counts as 0.

    Raises DataError if there are grades of these questions, but every one goes with something else that was asked.
    """
    rows = read_grades(path)
    replies = {row["asked"]: row["reply"] for row in rows}
    found = {line["custom_id"]: replies.get(fingerprint(line)) for line in lines}
    graders = sorted({row["grader"] for row in rows if row["id"] in found})
    if graders and not any(reply is not None for reply in found.values()):
        names = ", ".join(map(shown, graders))
        raise DataError(f"{path}: its grades, by {names}, are of other answers, or --grader-model or --rule is another")
    read = {"mmvet": read_correctness, "llavabench": read_pair}[task]
    return {str(item.id): read(found[str(item.id)]) if found.get(str(item.id)) is not None else None for item in items}


def read_correctness(reply: str) -> tuple[float] | None:
    """A number in [0, 1], the first word of the reply (mm-vet_evaluator.py)."""
    match = re.match(r"\s*(\d*\.?\d+)(?:\s|$)", reply)
    value = float(match[1]) if match else -1.0
    return (value,) if 0 <= value <= 1 else None


def read_pair(reply: str) -> tuple[float, float] | None:
    """Two numbers from 1 to 10 in the first line, commas allowed (eval_gpt_review_bench.py)."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    try:
        one, two = map(float, words)
    except ValueError:
        return None
    return (one, two) if 1 <= one <= 10 and 1 <= two <= 10 else None


# ---------------------------------------------------------------------------------------------------------------------
# figures


def score_mmvet(items: list[Item], grades: dict[str, tuple | None]) -> dict[str, float]:
    """100 x the mean grade: over all, by capability, and by what is asked for together."""
    groups = defaultdict(list)
    for item in items:
        value = (grades[str(item.id)] or (0.0,))[0]
        skills = truth_of(item)[1]
        for name in ("total", *skills, *(["_".join(skills)] if len(skills) > 1 else [])):
            groups[name].append(value)
    return {name: 100 * sum(values) / len(values) for name, values in groups.items()}


def score_llavabench(items: list[Item], grades: dict[str, tuple | None]) -> dict[str, float]:
    """100 x the sum of its grades / the sum of the reference's, over all and by category (summarize_gpt_review.py).

    An answer without a grade has the lowest, 1, against a reference with 10.
    """
    groups = defaultdict(list)
    for item in items:
        for name in ("all", item.groups["category"]):
            groups[name].append(grades[str(item.id)] or (10.0, 1.0))
    return {name: 100 * sum(its for _, its in rows) / sum(other for other, _ in rows) for name, rows in groups.items()}


def need_grades(items: list[Item], answers: list[str | None]) -> dict[str, float]:
    """In the place of a score where there are no grades."""
    raise DataError(f"{shown(items[0].id)} and the others are graded by a language model: --grades FILE, see grader.py")
