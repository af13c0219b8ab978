"""Write the file that a benchmark's server takes, as its own tools and LLaVA's converters write it."""

import json
import re
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from evaluation import grader
from evaluation.metrics import normalize_gqa, normalize_m4c
from evaluation.predictions import Item, note


def mmbench_row(item: Item, answer: str) -> list[object]:
    """Index, question, A to D, prediction, answer."""
    options, truth = [item.options.get(letter, "") for letter in "ABCD"], item.truth[0] if item.truth else ""
    return [int(item.id), item.text.split("\nA. ")[0], *options, answer, truth]


# The entry of an item and its answer. VQA servers take answers in the scorer's normalized form (LLaVA's
# convert_vqav2_for_submission.py and others).
SUBMISSIONS = {
    **dict.fromkeys(("vqav2", "okvqa"), lambda item, answer: {"question_id": item.id, "answer": normalize_m4c(answer)}),
    "vizwiz": lambda item, answer: {"image": item.image, "answer": normalize_m4c(answer)},
    "gqa": lambda item, answer: {"questionId": str(item.id), "prediction": normalize_gqa(answer)},
    "docvqa": lambda item, answer: {"questionId": item.id, "answer": answer},
    **dict.fromkeys(("coco", "textcaps"), lambda item, answer: {"image_id": item.id, "caption": answer}),
    "seed": lambda item, answer: {"question_id": item.id, "prediction": answer},
    "mmvet": lambda item, answer: (f"v1_{str(item.id).removeprefix('v1_')}", answer),  # mm-vet_evaluator.py
    # Requests in the form of OpenAI's batch files; the user must replace the model name MODEL.
    "llavabench": lambda item, answer: grader.build_requests("llavabench", [item], [answer], None, "MODEL")[0],
    "mmbench": mmbench_row,
}
LEFT_OUT = ("coco", "textcaps", "llavabench")  # without an answer, an item has no entry; elsewhere its answer is empty


def write_submission(task: str, items: list[Item], answers: list[str | None], path: Path):
    """A JSON list of entries; for SEED and LLaVA-Bench one entry a line, for MM-Vet an object, for MMBench a table."""
    answered = [(item, answer) for item, answer in zip(items, answers) if answer is not None or task not in LEFT_OUT]
    rows = [SUBMISSIONS[task](item, answer or "") for item, answer in answered]
    path.parent.mkdir(parents=True, exist_ok=True)
    if task == "mmbench":
        write_xlsx(path, [["index", "question", *"ABCD", "prediction", "answer"], *rows])
    elif task in ("seed", "llavabench"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(dict(rows), indent=2) if task == "mmvet" else json.dumps(rows))


SCHEMAS, TYPE = "http://schemas.openxmlformats.org", "application/vnd.openxmlformats-"
SHEETS, OFFICE = f"{SCHEMAS}/spreadsheetml/2006/main", f"{SCHEMAS}/officeDocument/2006/relationships"
RELATION = f'<Relationships xmlns="{SCHEMAS}/package/2006/relationships"><Relationship Id="rId1" Type="{OFFICE}/'
XLSX_PARTS = {  # the minimum for a spreadsheet program (ECMA-376, part 1)
    "[Content_Types].xml": f'<Types xmlns="{SCHEMAS}/package/2006/content-types">'
    f'<Default Extension="rels" ContentType="{TYPE}package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{TYPE}officedocument.spreadsheetml.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{TYPE}officedocument.spreadsheetml.worksheet+xml"/>'
    "</Types>",
    "_rels/.rels": f'{RELATION}officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{SHEETS}" xmlns:r="{OFFICE}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'{RELATION}worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
    "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEETS}"><sheetData>ROWS</sheetData></worksheet>',
}
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def write_xlsx(path: Path, rows: list[list[object]]):
    """Write one sheet of numbers and texts. Equal rows give equal bytes: the entries of the archive have no times."""

    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(NO_XML.sub("\ufffd", str(value)))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    invalid = sum(bool(NO_XML.search(str(value))) for row in rows for value in row)
    note([path], invalid, "texts hold characters that XML cannot: replaced by U+FFFD")
    lines = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in XLSX_PARTS.items():
            file.writestr(zipfile.ZipInfo(name), head + content.replace("ROWS", lines))
