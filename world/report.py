"""The speedrun's report: accuracy by family, loss curves, a sheet of held-out images, the minutes of every step."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.scores import accuracy_by_category
from training import plots
from world.drawing import load_font
from world.language import FAMILIES

STAGES = ("stage0/clip", "stage0/decoder", "stage1", "stage2-frozen", "stage2")
EXTRA_STEPS = ("no-stage1-frozen", "no-stage1", "ablation evaluation")  # of --ablation; not counted in the minutes


def write_report(out: Path, minutes: dict[str, float], dial: float):
    """Write report.md, report.json, loss.png and sheet.png from what the steps left in `out`.

    Args: minutes: minutes that each step took; dial: the value of --minutes.
    """
    answers = read_rows(out / "stage2/answers.jsonl")
    plots.loss_curve(out / "loss.png", {name: read_rows(out / name / "log.jsonl") for name in STAGES})
    draw_sheet(out, answers, out / "sheet.png")
    accuracy, blind = accuracy_by_category(answers), accuracy_by_category(read_rows(out / "stage2/answers-blank.jsonl"))
    result = {
        "minutes": round(sum(value for name, value in minutes.items() if name not in EXTRA_STEPS), 2),
        "dial": dial,
        "accuracy": round_values(accuracy),
        "blind": round_values(blind),
        "stages": {name: json.loads((out / name / "run.json").read_text())["loss"] for name in STAGES},
        "steps": round_values(minutes),
    }
    if ablation := read_rows(out / "no-stage1/answers.jsonl"):
        result["without_stage1"] = round_values(accuracy_by_category(ablation))
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "report.md").write_text(to_markdown(out, result))
    overall, guessed = result["accuracy"]["overall"], result["blind"]["overall"]
    summary = f"overall {overall:.1f} %, blind {guessed:.1f} %, {result['minutes']:.1f} minutes"
    print(f"\n{summary}: {out}/report.md")


def read_rows(path: Path) -> list[dict]:
    """Return a jsonl file's rows, sorted by question_id if they have one; an empty list if there is no such file."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return sorted(rows, key=lambda row: row.get("question_id", 0))


def round_values(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def to_markdown(out: Path, result: dict) -> str:
    """Return report.md from the content of report.json."""
    without = result.get("without_stage1", {})
    head = "| family | accuracy | blind |" + (" without stage 1 |" if without else "")
    lines = [f"# Speedrun, {result['dial']:g} minutes", "", f"It took {result['minutes']:.1f} minutes.", "", head]
    lines.append("|---|---:|---:|" + ("---:|" if without else ""))
    for name in ("overall", *FAMILIES):
        extra = f" {without[name]:.1f} % |" if without else ""
        lines.append(f"| {name} | {result['accuracy'][name]:.1f} % | {result['blind'][name]:.1f} % |{extra}")
    lines += ["", "Blind: the same model, with every image replaced by the mean color.", "", "![loss](loss.png)", ""]
    lines += ["![held-out images](sheet.png)", "", "| step | minutes |", "|---|---:|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in result["steps"].items()]
    lines += ["", "Ask it about an image of your own, or talk with it:", ""]
    lines += [f"    python sample.py --model {out}/stage2 --image YOUR.jpg", ""]
    if (out / "probes/probes.md").exists():
        probes = (out / "probes/probes.md").read_text().replace("# Probes", "# Where it goes wrong")
        lines.append(probes.replace("](probes.png)", "](probes/probes.png)"))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# the sheet of held-out images

SCALE = 2  # the sheet is drawn for screens of twice the usual resolution
IMAGE, MARGIN, LINE = 192 * SCALE, 12 * SCALE, 17 * SCALE  # pixels
CARD = IMAGE + 2 * MARGIN
PAGE, WHITE, BORDER = "#f6f8fa", "#ffffff", "#d0d7de"
DARK, GRAY, GREEN, RED, AMBER = "#1f2328", "#59636e", "#1a7f37", "#cf222e", "#9a6700"


def draw_sheet(out: Path, answers: list[dict], path: Path, columns: int = 5, rows: int = 4):
    """Draw cards with a held-out image, the question and the answer: green if right, red with the truth if wrong."""
    questions = {row["question_id"]: row for row in read_rows(out / "world/questions.jsonl")}
    asked = [questions[answer["question_id"]] for answer in answers[: columns * rows]]
    cards = [(question["image"], card_lines(question, answer)) for question, answer in zip(asked, answers)]
    grid = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [IMAGE + 3 * MARGIN + LINE * max(len(lines) for _, lines in row) for row in grid]
    size = columns * (CARD + MARGIN) + MARGIN, sum(heights) + MARGIN * (len(grid) + 1)
    sheet = Image.new("RGBA", size)
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 2 * MARGIN, PAGE, BORDER, SCALE)
    y = MARGIN
    for row, height in zip(grid, heights):
        for column, (name, lines) in enumerate(row):
            x = MARGIN + column * (CARD + MARGIN)
            pen.rounded_rectangle((x, y, x + CARD, y + height), MARGIN, WHITE, BORDER, SCALE)
            with Image.open(out / "world" / name) as image:
                sheet.paste(image.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS), (x + MARGIN, y + MARGIN))
            for i, (text, color) in enumerate(lines):
                pen.text((x + MARGIN, y + IMAGE + 2 * MARGIN + i * LINE), text, color, load_font(SCALE * 12))
        y += height + MARGIN
    sheet.save(path)


def card_lines(question: dict, answer: dict) -> list[tuple[str, str]]:
    """Return the (text, color) lines of a card."""
    score = answer["metadata"]["score"]
    color = GREEN if score == 1 else AMBER if score > 0 else RED
    parts = [(question["category"], GRAY, 1), (answer["prompt"], DARK, 2), (answer["text"] or "(no answer)", color, 5)]
    if score < 1:
        parts.append((f"Truth: {question['answer']}", GRAY, 5))
    return [(line, color) for text, color, most in parts for line in wrap(text, most)]


def wrap(text: str, most: int) -> list[str]:
    """Break text into at most `most` lines of a card's width; an ellipsis marks what is cut."""
    lines, font = [""], load_font(SCALE * 12)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CARD - 2 * MARGIN or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]
