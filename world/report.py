"""The speedrun's report: accuracy by family, loss curves, a sheet of held-out pictures, the time of every step."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.scores import accuracy_by_category
from training import plots
from world.drawing import load_font
from world.language import FAMILIES

STAGES = ("stage0/clip", "stage0/decoder", "stage1", "stage2")


def read_rows(path: Path) -> list[dict]:
    """A jsonl file's rows, those with a question_id in its order; none if there is no such file."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return sorted(rows, key=lambda row: row.get("question_id", 0))


def sheet(out: Path, answers: list[dict], columns: int = 5, rows: int = 4):
    """Held-out pictures as the model got them, each with question, answer and truth; wrong answers are red."""
    questions = {row["question_id"]: row for row in read_rows(out / "world/questions.jsonl")}
    width, height, side = 250, 265, 150
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(canvas), load_font(13)
    for i, answer in enumerate(answers[: columns * rows]):
        question = questions[answer["question_id"]]
        x, y = i % columns * width + 10, i // columns * height + 8
        with Image.open(out / "world" / question["image"]) as picture:
            canvas.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        right = answer["metadata"]["score"] == 1
        text = wrapped([answer["prompt"], "> " + answer["text"]], 36, 6)
        pen.text((x, y + side + 4), text, (20, 110, 50) if right else (190, 30, 30), font)
        if not right:
            pen.text((x + side + 6, y), wrapped(["truth:", question["answer"]], 13, 9), (90, 90, 90), font)
    canvas.save(out / "sheet.png")


def wrapped(lines: list[str], width: int, most: int) -> str:
    """At most `most` lines of `width` characters, broken at spaces."""
    result = []
    for line in lines:
        row = ""
        for word in line.split():
            if len(row) + len(word) >= width:
                result.append(row)
                row = ""
            row += word + " "
        result.append(row)
    return "\n".join(result[:most])


def write(out: Path, minutes: dict[str, float], dial: float):
    """Write report.md, report.json, loss.png and sheet.png from what the steps left in `out`."""
    answers, blind = read_rows(out / "stage2/answers.jsonl"), read_rows(out / "stage2/answers-blank.jsonl")
    accuracy, blank = accuracy_by_category(answers), accuracy_by_category(blind)
    ablated = read_rows(out / "no-stage1/answers.jsonl")
    ablation = accuracy_by_category(ablated) if ablated else {}
    logs = {name: read_rows(out / name / "log.jsonl") for name in STAGES}
    plots.loss_curve(out / "loss.png", logs)
    sheet(out, answers)
    total = sum(value for name, value in minutes.items() if name not in ("no-stage1", "ablation evaluation"))
    result = {
        "minutes": round(total, 2),
        "dial": dial,
        "accuracy": {name: round(value, 2) for name, value in accuracy.items()},
        "blind_accuracy": round(blank["overall"], 2),
        "blind": {name: round(value, 2) for name, value in blank.items()},
        "stages": {name: json.loads((out / name / "run.json").read_text())["loss"] for name in STAGES},
        "steps": {name: round(value, 2) for name, value in minutes.items()},
    }
    if ablation:
        result["without_stage1"] = {name: round(value, 2) for name, value in ablation.items()}
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "report.md").write_text(markdown(out, result, minutes))
    print(
        f"\noverall {accuracy['overall']:.1f} %, blind {blank['overall']:.1f} %, {total:.1f} minutes: {out}/report.md"
    )


def markdown(out: Path, result: dict, minutes: dict[str, float]) -> str:
    """report.md, from what report.json holds and the minutes of every step."""
    families = ["overall", *FAMILIES]
    without = result.get("without_stage1", {})
    head = "| family | accuracy | blind |" + (" without stage 1 |" if without else "")
    lines = [f"# Speedrun, {result['dial']:g} minutes", "", f"It took {result['minutes']:.1f} minutes.", "", head]
    lines.append("|---|---:|---:|" + ("---:|" if without else ""))
    for name in families:
        extra = f" {without[name]:.1f} % |" if without else ""
        lines.append(f"| {name} | {result['accuracy'][name]:.1f} % | {result['blind'][name]:.1f} % |{extra}")
    lines += ["", "Blind: the same model, every picture replaced by the mean color.", "", "![loss](loss.png)", ""]
    probed = (out / "probes/probes.md").read_text() if (out / "probes/probes.md").exists() else ""
    lines += ["![held-out pictures](sheet.png)", "", "| step | minutes |", "|---|---:|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in minutes.items()]
    lines += ["", "Go on with your own picture, or a conversation:", ""]
    lines += [f"    python sample.py --model {out}/stage2 --image YOUR.jpg", ""]
    lines += [probed.replace("# Probes", "# Where it goes wrong").replace("](probes.png)", "](probes/probes.png)")]
    return "\n".join(lines)
