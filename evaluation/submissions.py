"""Write the file that a benchmark's server takes, as its own tools and LLaVA's converters write it."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from evaluation import grader
from evaluation.metrics import normalize_gqa, normalize_m4c
from evaluation.predictions import Item
from evaluation.scores import Answers


def json_list(make_row: Callable[[Item, str], dict]) -> Callable[[list[Item], Answers], str]:
    """A submission that is a JSON list with one row for each item; a missing answer is empty."""
    return lambda items, answers: json.dumps([make_row(item, answer or "") for item, answer in zip(items, answers)])


def captions(items: list[Item], answers: Answers) -> str:
    """COCO's results; missing captions are left out."""
    return json.dumps([{"image_id": i.id, "caption": a} for i, a in zip(items, answers) if a is not None])


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def seed(items: list[Item], answers: Answers) -> str:
    return json_lines([{"question_id": i.id, "prediction": a or ""} for i, a in zip(items, answers)])


def llavabench(items: list[Item], answers: Answers) -> str:
    """A request for each answer, in the form of OpenAI's batch files; the user must replace the model name MODEL."""
    return json_lines(grader.build_requests("llavabench", items, answers, None, "MODEL"))


def mmvet(items: list[Item], answers: Answers) -> str:
    """{"v1_0": answer}, as mm-vet_evaluator.py reads it."""
    keys = (f"v1_{str(item.id).removeprefix('v1_')}" for item in items)
    return json.dumps({key: answer or "" for key, answer in zip(keys, answers)}, indent=2)


def mmbench(items: list[Item], answers: Answers) -> list[list[object]]:
    """Rows of the .xlsx table that MMBench's server takes: index, question, A to D, prediction, answer."""
    rows = [["index", "question", *"ABCD", "prediction", "answer"]]
    for item, said in zip(items, answers):
        answer, options = item.truth[0] if item.truth else "", [item.options.get(letter, "") for letter in "ABCD"]
        rows.append([int(item.id), item.text.split("\nA. ")[0], *options, said or "", answer])
    return rows


# VQA servers take answers in the normalized form of the scorer (LLaVA's convert_vqav2_for_submission.py and its like).
vqa = json_list(lambda item, answer: {"question_id": item.id, "answer": normalize_m4c(answer)})
SUBMISSIONS = {
    "vqav2": vqa,
    "okvqa": vqa,
    "vizwiz": json_list(lambda item, answer: {"image": item.image, "answer": normalize_m4c(answer)}),
    "gqa": json_list(lambda item, answer: {"questionId": str(item.id), "prediction": normalize_gqa(answer)}),
    "docvqa": json_list(lambda item, answer: {"questionId": item.id, "answer": answer}),
    "coco": captions,
    "textcaps": captions,
    "seed": seed,
    "mmvet": mmvet,
    "llavabench": llavabench,
    "mmbench": mmbench,
}


def write_submission(task: str, items: list[Item], answers: Answers, path: Path):
    content = SUBMISSIONS[task](items, answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    if task == "mmbench":
        write_xlsx(path, content)
    else:
        path.write_text(content, encoding="utf-8")


SCHEMAS = "http://schemas.openxmlformats.org"
RELATIONS, SPREADSHEET = f"{SCHEMAS}/package/2006/relationships", f"{SCHEMAS}/spreadsheetml/2006/main"
OFFICE, TYPE = f"{SCHEMAS}/officeDocument/2006/relationships", "application/vnd.openxmlformats-"


def relation(kind: str, target: str) -> str:
    return (
        f'<Relationships xmlns="{RELATIONS}"><Relationship Id="rId1" Type="{OFFICE}/{kind}" Target="{target}"/>'
        "</Relationships>"
    )


XLSX_PARTS = {  # the minimum for a spreadsheet program (ECMA-376, part 1)
    "[Content_Types].xml": f'<Types xmlns="{SCHEMAS}/package/2006/content-types">'
    f'<Default Extension="rels" ContentType="{TYPE}package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{TYPE}officedocument.spreadsheetml.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{TYPE}officedocument.spreadsheetml.worksheet+xml"/>'
    "</Types>",
    "_rels/.rels": relation("officeDocument", "xl/workbook.xml"),
    "xl/workbook.xml": f'<workbook xmlns="{SPREADSHEET}" xmlns:r="{OFFICE}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": relation("worksheet", "worksheets/sheet1.xml"),
    "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SPREADSHEET}"><sheetData>ROWS</sheetData></worksheet>',
}
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def write_xlsx(path: Path, rows: list[list[object]]):
    """Write one sheet of numbers and texts. Equal rows give equal bytes: the entries of the archive have no times."""

    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(NO_XML.sub("\ufffd", str(value)))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    lines = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in XLSX_PARTS.items():
            file.writestr(zipfile.ZipInfo(name), head + content.replace("ROWS", lines))
