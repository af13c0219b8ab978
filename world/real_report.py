"""The report of a speedrun with a real decoder: what it sees, and what it knew before and knows after."""

import json
from pathlib import Path

from evaluation.scores import accuracy_by_category
from inputs.files import read_json
from training import plots
from world.language import FAMILIES
from world.report import draw_sheet, read_rows, round_values

CELL = 70  # characters of an answer in the table


def write_report(
    out: Path, speedrun: Path, accuracy: dict[str, dict], best: str, minutes: dict[str, float], flags: dict
):
    """Write report.md, report.json, loss.png and sheet.png.

    Args: speedrun: folder of the world; accuracy: by way of training stage 2, then by family; best: the best way;
    minutes: that each step took; flags: of the speedrun.
    """
    answers, stages = read_rows(out / best / "answers.jsonl"), ("stage1", *accuracy)
    blind = accuracy_by_category(read_rows(out / f"model-{best}/answers-blank.jsonl"))
    knowledge = {"before": read_json(out / "before.json")}
    knowledge |= {way: read_json(out / way / "knowledge.json") for way in accuracy}
    result = {
        "minutes": round(sum(minutes.values()), 2),
        "flags": flags,
        "questions": len(answers),
        "accuracy": {way: round_values(values) for way, values in accuracy.items()},
        "best": best,
        "blind": round_values(blind),
        "knowledge": knowledge,
        "replayed": len(json.loads((out / "replay.json").read_text())) if "lora-replay" in accuracy else 0,
        "stages": {name: read_json(out / name / "run.json")["loss"] for name in stages},
        "steps": round_values(minutes),
    }
    plots.loss_curve(out / "loss.png", {name: read_rows(out / name / "log.jsonl") for name in stages})
    draw_sheet(speedrun, answers, out / "sheet.png")
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "report.md").write_text(to_markdown(out, result))
    overall, guessed = result["accuracy"][best]["overall"], result["blind"]["overall"]
    print(f"\n{best} is best: {overall:.1f} %, blind {guessed:.1f} %: {out}/report.md")


def table(head: list[str], rows: list[list[str]], align: str = "---:") -> list[str]:
    """The lines of a Markdown table. Args: align: of all columns but the first."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def to_markdown(out: Path, result: dict) -> str:
    """Return report.md from the content of report.json."""
    ways, flags, best, replayed = list(result["accuracy"]), result["flags"], result["best"], result["replayed"]
    lines = [f"# A real decoder learns to see, {flags['minutes']:g} minutes", ""]
    lines += [f"Decoder: {flags['llm']}. World and tower: {flags['speedrun']}. Minutes: {result['minutes']:.1f}.", ""]
    lines += [f"## What it sees: {result['questions']:,} held-out questions", ""]
    columns, rows = [*(result["accuracy"][way] for way in ways), result["blind"]], []
    for name in ("overall", *FAMILIES):
        values = [column.get(name) for column in columns]  # a short run asks too few questions for some families
        rows.append([name, *("" if value is None else f"{value:.1f} %" for value in values)])
    lines += table(["family", *ways, f"{best}, blind"], rows)
    meanings = {
        "full": "projector and all weights of the decoder train",
        "lora": "projector and low-rank updates of rank 16 train",
        "lora-images": "as lora, but the updates leave text without an image as it is (in our scripts: a merged model "
        "and transformers apply them always)",
        "lora-replay": f"as lora; a tenth of the samples are {replayed} answers of its own to plain prompts",
    }
    lines += [f"* {way}: {meanings[way]}" for way in ways]
    lines += ["* blind: every image is replaced by the mean color", "", *knowledge_page(result["knowledge"])]
    lines += ["![loss](loss.png)", "", "![held-out images](sheet.png)", ""]
    lines += table(["step", "minutes"], [[name, f"{value:.1f}"] for name, value in result["steps"].items()])
    who = "transformers" if flags["projector"] == "mlp2x_gelu" else "only this project"
    lines += [f"The best model, in a folder that {who} loads: {out}/model-{best}", ""]
    return "\n".join([*lines, f"    python sample.py --model {out}/model-{best} --image YOUR.jpg", ""])


def knowledge_page(knowledge: dict[str, dict]) -> list[str]:
    """The lines of the page on what the decoder knew before and knows after, from the files of world/knowledge.py."""
    before, count = knowledge["before"], len(knowledge["before"]["answers"])
    rows = [["perplexity", *(f"{values['perplexity']:.2f}" for values in knowledge.values())]]
    rows += [[f"right answers of {count}", *(str(values["right"]) for values in knowledge.values())]]
    lines = ["## What it knew before and what it knows after", "", *table(["", *knowledge], rows)]
    part = f"first {before['tokens']:,} of " if before["tokens"] < before["tokens_of_text"] else ""
    lines += [f"Perplexity: on the {part}{before['tokens_of_text']:,} tokens of {before['text']}."]
    lines += [f"Answers are cut to {CELL} characters here (...); report.json has them whole.", ""]
    rows = []
    for i, first in enumerate(before["answers"]):
        rows.append([first["question"], *(show_answer(values["answers"][i]) for values in knowledge.values())])
    return lines + table(["question", *knowledge], rows, "---")


def show_answer(row: dict) -> str:
    """An answer in a cell of a table, bold if it is wrong."""
    text = " ".join(row["answer"].split()).replace("|", "\\|").replace("*", "\\*") or "(no answer)"
    text = text if len(text) <= CELL else text[:CELL].rstrip() + " ..."
    return text if row["right"] else f"**wrong:** {text}"
