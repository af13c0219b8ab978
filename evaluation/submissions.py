"""What the benchmarks' servers take, as their own tools and LLaVA's converters write it."""

import json
import re
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from evaluation import grader
from evaluation.metrics import LETTERS, normalize_m4c
from evaluation.predictions import Item
from evaluation.scores import gqa_form
from inputs.records import DataError

Answers = list[str | None]


def vqav2(items: list[Item], answers: Answers) -> str:
    """EvalAI's, in the scorer's form; a missing one is empty (LLaVA's convert_vqav2_for_submission.py)."""
    return json.dumps([{"question_id": i.id, "answer": normalize_m4c(a or "")} for i, a in zip(items, answers)])


def vizwiz(items: list[Item], answers: Answers) -> str:
    return json.dumps([{"image": i.image, "answer": normalize_m4c(a or "")} for i, a in zip(items, answers)])


def gqa(items: list[Item], answers: Answers) -> str:
    return json.dumps([{"questionId": str(i.id), "prediction": gqa_form(a or "")} for i, a in zip(items, answers)])


def docvqa(items: list[Item], answers: Answers) -> str:
    return json.dumps([{"questionId": i.id, "answer": a or ""} for i, a in zip(items, answers)])


def captions(items: list[Item], answers: Answers) -> str:
    return json.dumps([{"image_id": i.id, "caption": a} for i, a in zip(items, answers) if a is not None])


def seed(items: list[Item], answers: Answers) -> str:
    lines = [{"question_id": i.id, "prediction": a or ""} for i, a in zip(items, answers)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def mmvet(items: list[Item], answers: Answers) -> str:
    """{"v1_0": answer}, what mm-vet_evaluator.py reads."""
    keys = (key if (key := str(item.id)).startswith("v1_") else f"v1_{key}" for item in items)
    return json.dumps({key: answer or "" for key, answer in zip(keys, answers)}, indent=2)


def llavabench(items: list[Item], answers: Answers) -> str:
    """A request for each answer, in the form of OpenAI's batches; the model is to be filled in."""
    lines = grader.requests("llavabench", items, answers, None, "MODEL")
    return "".join(json.dumps(line) + "\n" for line in lines)


def mmbench(items: list[Item], answers: Answers) -> list[list[object]]:
    """Rows of the table that MMBench's server takes as .xlsx: index, question, A to D, prediction, answer."""
    rows = [["index", "question", *"ABCD", "prediction", "answer"]]
    for item, said in zip(items, answers):
        answer, options = item.truth[0] if item.truth else "", item.options
        question = item.text.split(f"\n{LETTERS[0]}. ")[0]
        rows.append([int(item.id), question, *(options.get(letter, "") for letter in "ABCD"), said or "", answer])
    return rows


SUBMISSIONS = {
    "vqav2": vqav2,
    "okvqa": vqav2,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "docvqa": docvqa,
    "coco": captions,
    "textcaps": captions,
    "seed": seed,
    "mmvet": mmvet,
    "llavabench": llavabench,
    "mmbench": mmbench,
}


def server_format(task: str | None):
    """What makes a server's file of a task. Raises DataError if there is no server."""
    if task not in SUBMISSIONS:
        raise DataError(f"--submission: no server takes {task or 'these'}, only {', '.join(SUBMISSIONS)}")
    return SUBMISSIONS[task]


def write_submission(task: str, items: list[Item], answers: Answers, path: Path):
    content = server_format(task)(items, answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_xlsx(path, content)


NAMES = "http://schemas.openxmlformats.org"
SHEET = f'<worksheet xmlns="{NAMES}/spreadsheetml/2006/main"><sheetData>{{}}</sheetData></worksheet>'
PARTS = {  # the least that a spreadsheet program opens (ECMA-376, part 1)
    "[Content_Types].xml": f'<Types xmlns="{NAMES}/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{NAMES}/package/2006/relationships"><Relationship Id="rId1" '
    f'Type="{NAMES}/officeDocument/2006/relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{NAMES}/spreadsheetml/2006/main" '
    f'xmlns:r="{NAMES}/officeDocument/2006/relationships"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{NAMES}/package/2006/relationships"><Relationship Id="rId1" '
    f'Type="{NAMES}/officeDocument/2006/relationships/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def write_xlsx(path: Path, rows: list[list[object]]):
    """One sheet of numbers and texts; the same rows write the same bytes."""

    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(NO_XML.sub("\ufffd", str(value)))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    lines = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (PARTS | {"xl/worksheets/sheet1.xml": SHEET.format(lines)}).items():
            file.writestr(zipfile.ZipInfo(name), head + content)
