"""Say what the wrong answers to "Where is the star?" name: the cell of another object, or an empty cell.

    python tests/tools/position_errors.py [out/speedrun/world] [out/speedrun/stage2/answers.jsonl]

A model that knew nothing of the image would name the nine cells alike. One that knows which cells hold an object, but
not which of them holds the object asked about, names another object's cell, and is right once in as many objects.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inputs.files import OUTPUT_ROOT
from world.language import CELL_NAMES


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    """Print one line for each number of objects, then one for all."""
    given = dict(enumerate(map(Path, sys.argv[1:])))
    world = given.get(0, OUTPUT_ROOT / "speedrun" / "world")
    answers = read_rows(given.get(1, OUTPUT_ROOT / "speedrun" / "stage2" / "answers.jsonl"))
    texts = {row["question_id"]: row["text"] for row in answers}
    cells = {row["image"]: [obj["cell"] for obj in row["things"]] for row in read_rows(world / "scenes.jsonl")}
    counts = {}  # number of objects -> questions, right, another object's cell
    for row in read_rows(world / "questions.jsonl"):
        if row["category"] != "position":
            continue
        text, occupied = texts[row["question_id"]], cells[row["image"]]
        right = text.rstrip(".").lower() == row["answer"].rstrip(".").lower()
        named = text.split(" the ")[-1].rstrip(".")
        other = not right and named in CELL_NAMES and CELL_NAMES.index(named) in occupied
        for key in (len(occupied), 0):
            counts[key] = [a + b for a, b in zip(counts.get(key, (0, 0, 0)), (1, right, other))]
    for key, (asked, right, other) in sorted(counts.items(), reverse=True):
        name = f"{key} objects" if key else "all"
        print(f"{name}: {right} of {asked} right; {other} of {asked - right} wrong ones name another object's cell")


if __name__ == "__main__":
    main()
