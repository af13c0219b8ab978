"""Small files of every benchmark in their published form, with predictions of which about half are right."""

import base64
import io
import json
import random
from pathlib import Path

from PIL import Image

WORDS = "red|blue|green|dog|cat|bus|two|3|left|yes|no|kitchen|a man|the sky|it's|1,000|black/white|none"
WORDS = WORDS.split("|")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def people(rng: random.Random) -> list[dict]:
    said = rng.choices(rng.sample(WORDS, 3), (6, 2, 1), k=10)
    return [{"answer": word, "answer_id": i + 1, "answer_confidence": "yes"} for i, word in enumerate(said)]


def vqav2(folder: Path, rng: random.Random, n: int):
    asked = [{"question_id": 10 * i, "image_id": i, "question": f"What is {i}?"} for i in range(n)]
    kinds = [{"answer_type": rng.choice(["yes/no", "number", "other"]), "question_type": "what is"} for _ in asked]
    truths = [{"question_id": q["question_id"], "answers": people(rng)} | k for q, k in zip(asked, kinds)]
    files = [write(folder / "q.json", {"data_subtype": "val2014", "questions": asked})]
    files.append(write(folder / "a.json", {"annotations": truths}))
    return files, [{"question_id": t["question_id"], "answer": rng.choice(t["answers"])["answer"]} for t in truths]


def gqa(folder: Path, rng: random.Random, n: int):
    questions, choices = {}, {}
    for i in range(n):
        types = {"structural": rng.choice(["query", "verify"]), "semantic": rng.choice(["attr", "rel"])}
        truth = {"answer": rng.choice(WORDS[:8]), "isBalanced": i % 5 > 0, "types": types}
        truth |= {
            "entailed": [f"q{i}", f"q{(i + 1) % n}"],
            "groups": {"global": rng.choice([None, "color"]), "local": "x"},
        }
        questions[f"q{i}"] = {"imageId": str(i), "question": f"What is {i}?"} | truth
        choices[f"q{i}"] = {"valid": WORDS[:6], "plausible": WORDS[:4]}
    files = [write(folder / "questions.json", questions), write(folder / "choices.json", choices)]
    return files, [{"questionId": k, "prediction": rng.choice([q["answer"], "red"])} for k, q in questions.items()]


def textvqa(folder: Path, rng: random.Random, n: int):
    data = [
        {
            "question_id": i,
            "image_id": f"im{i // 2}",
            "question": f"What says {i}?",
            "answers": [p["answer"] for p in people(rng)],
        }
        for i in range(n)
    ]
    tokens = [{"image_id": f"im{i}", "ocr_tokens": ["stop", "7"]} for i in range(n)]
    files = [write(folder / "val.json", {"data": data}), write(folder / "ocr.json", {"data": tokens})]
    end = "\nReference OCR token: stop, 7\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": d["image_id"], "prompt": d["question"] + end, "text": rng.choice(d["answers"])} for d in data
    ]
    return files, rows


def vizwiz(folder: Path, rng: random.Random, n: int):
    data = [
        {
            "image": f"V_{i:08d}.jpg",
            "question": f"What is {i}?",
            "answers": people(rng),
            "answer_type": rng.choice(["other", "number"]),
        }
        for i in range(n)
    ]
    return [write(folder / "val.json", data)], [
        {"image": d["image"], "answer": rng.choice(d["answers"])["answer"]} for d in data
    ]


def pope(folder: Path, rng: random.Random, n: int):
    files, rows = [], []
    for split in ("random", "popular", "adversarial"):
        labels = [
            {
                "question_id": i,
                "image": f"{i // 6}.jpg",
                "text": f"Is there a {WORDS[i % 12]} in the image?",
                "label": rng.choice(["yes", "no"]),
            }
            for i in range(1, n + 1)
        ]
        files.append(write(folder / f"coco_pope_{split}.json", lines(labels)))
        said = ["Yes", "No", "yes", "no", "Yes, there is.", "No, there is not.", "There is not"]
        rows += [{"question_id": f"{split}/{label['question_id']}", "text": rng.choice(said)} for label in labels]
    return files, rows


def scienceqa(folder: Path, rng: random.Random, n: int):
    problems = {}
    for i in range(n):
        choices = rng.sample(WORDS, rng.randint(2, 4))
        problems[str(i)] = {
            "question": f"Which {i}?",
            "choices": choices,
            "answer": rng.randrange(len(choices)),
            "hint": "",
        }
        problems[str(i)]["image"] = "image.png" if i % 2 else None
    files = [write(folder / "problems.json", problems), write(folder / "pid_splits.json", {"test": list(problems)})]
    forms = ("{}", "{}. so it is", "The answer is {}.", "I think {}")
    return files, [{"question_id": i, "text": rng.choice(forms).format(rng.choice("AB"))} for i in problems]


def mme(folder: Path, rng: random.Random, n: int):
    rows = []
    for task in ("existence", "OCR", "text_translation"):
        for i in range(n):
            qa = [(f"Is {task} {i} {k}? Please answer yes or no.", rng.choice(["Yes", "No"])) for k in "ab"]
            write(folder / "mme" / task / f"{i:03d}.txt", "".join(f"{q}\t{a}\n" for q, a in qa))
            end = "\nAnswer the question using a single word or phrase."
            rows += [
                {
                    "question_id": f"{task}/{i:03d}.png",
                    "prompt": q.replace(" Please answer yes or no.", "") + end,
                    "text": rng.choice(["Yes", "no.", "No", "maybe"]),
                }
                for q, _ in qa
            ]
    return [folder / "mme"], rows


def mmbench(folder: Path, rng: random.Random, n: int):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG")
    image, rows, said = base64.b64encode(file.getvalue()).decode(), [], []
    for i in range(n):
        options, answer = rng.sample(WORDS[:9], 4), rng.randrange(4)
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            letter = "ABCD"[(answer - turn) % 4]
            rows.append(
                [str(turn * 1_000_000 + i), f"Which {i}?", "nan", *turned, letter, "color", "perception", image]
            )
            wrong = turn == 3 and rng.random() < 0.4
            said.append({"question_id": turn * 1_000_000 + i, "text": rng.choice("ABCD") if wrong else letter})
    head = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image"]
    return [write(folder / "dev.tsv", "".join("\t".join(row) + "\n" for row in [head, *rows]))], said


def seed(folder: Path, rng: random.Random, n: int):
    rows = []
    for i in range(n):
        kind = rng.choice(["image", "video"])
        row = {
            "question_id": str(i),
            "data_type": kind,
            "data_id": f"{i}.jpg",
            "question": f"Which {i}?",
            "question_type_id": 1 + i % 2,
        }
        rows.append(row | {f"choice_{k}": rng.choice(WORDS) for k in "abcd"} | {"answer": rng.choice("ABCD")})
    files = [write(folder / "seed.json", {"questions": rows, "question_type": {"Scene": 1, "Counting": 2}})]
    return files, [{"question_id": r["question_id"], "prediction": rng.choice([r["answer"], "A"])} for r in rows]


CAPTIONS = ["a man riding a wave on a board", "two dogs in the park", "a red bus on the street"]
CAPTIONS += ["a cat's toy, on a mat.", "a plate of food"]


def coco(folder: Path, rng: random.Random, n: int):
    content = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(n)]}
    content["annotations"] = [{"image_id": i, "caption": rng.choice(CAPTIONS)} for i in range(n) for _ in range(5)]
    return [write(folder / "captions.json", content)], [
        {"image_id": i, "caption": rng.choice(CAPTIONS)} for i in range(n)
    ]


def textcaps(folder: Path, rng: random.Random, n: int):
    data = [{"image_id": f"im{i}", "caption_str": rng.choice(CAPTIONS)} for i in range(n) for _ in range(5)]
    return [write(folder / "val.json", {"data": data})], [
        {"image_id": f"im{i}", "caption": rng.choice(CAPTIONS)} for i in range(n)
    ]


def docvqa(folder: Path, rng: random.Random, n: int):
    data = [
        {"questionId": i, "question": f"What is {i}?", "image": f"documents/{i}.png", "answers": rng.sample(WORDS, 2)}
        for i in range(n)
    ]
    rows = [{"questionId": d["questionId"], "answer": rng.choice([d["answers"][0], "nothing"])} for d in data]
    return [write(folder / "val.json", {"data": data})], rows


def chartqa(folder: Path, rng: random.Random, n: int):
    files, rows = [], []
    for split in ("human", "augmented"):
        data = [{"imgname": f"{i}.png", "query": f"How many {i}?", "label": str(rng.randint(0, 99))} for i in range(n)]
        files.append(write(folder / f"test_{split}.json", data))
        rows += [
            {"question_id": f"{split}/{i}", "text": rng.choice([d["label"], "7", str(float(d["label"]) * 1.04)])}
            for i, d in enumerate(data)
        ]
    return files, rows


def medical(folder: Path, rng: random.Random, n: int):
    data = [
        {
            "qid": i,
            "image_name": f"{i}.jpg",
            "question": f"What is {i}?",
            "answer": rng.choice(["yes", "no"] if i % 2 else WORDS),
            "answer_type": "CLOSED" if i % 2 else "OPEN",
        }
        for i in range(n)
    ]
    said = ["yes", "no", "maybe", "Yes, it is the man"]
    return [write(folder / "test.json", data)], [
        {"qid": d["qid"], "text": rng.choice([d["answer"]] * 4 + said)} for d in data
    ]


MAKERS = {
    f.__name__: f
    for f in (vqav2, gqa, textvqa, vizwiz, pope, scienceqa, mme, mmbench, seed, coco, textcaps, docvqa, chartqa)
}
MAKERS |= {"okvqa": vqav2, "vqa-rad": medical, "slake": medical, "pathvqa": medical}
