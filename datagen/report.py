"""The report of a run as one HTML file that loads nothing: counts, what each filter took, samples with their images."""

import base64
import io
from collections import Counter
from html import escape
from pathlib import Path

from datagen.asking import Turns
from datagen.filters import Draft, question_type
from datagen.nouns import chair
from inputs.files import write_atomic
from inputs.images import BadImage, open_image, resolve_inside

EXAMPLES, SAMPLES, SIDE = 3, 12, 220  # shown of each filter; of the kept records; pixels of an image's longer side
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #1f2328; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; } th, td { padding: .2em .9em .2em 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: #59636e; font-weight: 600; }
td.bar { text-align: left; width: 22em; } .bar i { display: block; height: .8em; margin-top: .3em;
background: #0969da; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em; }
.card { border: 1px solid #d0d7de; border-radius: 8px; padding: .8em; overflow-wrap: anywhere; }
.card img { display: block; max-width: 100%; margin: 0 auto .6em; } .card p { margin: .3em 0; }
.q { font-weight: 600; } .why { color: #cf222e; } .small { color: #59636e; font-size: .87em; }
"""


def write_report(path: Path, images: Path, result, counts: dict, nouns):
    """Write the page. Args: images: folder of the images; result: of make.Result; counts: of make.count_result."""
    parts = [f"<h1>{len(result.kept):,} records from {len(result.requests):,} requests</h1>"]
    parts += [counts_table(counts), tokens_line(counts), missing_list(counts)]
    parts += [types_table(result.kept), nouns_line(result.kept, nouns)]
    parts += ["<h2>What the filters took</h2>"]
    for name in counts["dropped"]:
        taken = [(draft, reason) for draft, found, reason in result.dropped if found == name]
        if taken:
            parts.append(f"<h3>{escape(name)}: {len(taken):,}</h3>")
            parts.append(cards([card(draft, images, reason) for draft, reason in taken[:EXAMPLES]]))
    idle = [name for name, kinds in counts["dropped"].items() if not any(kinds.values())]
    parts.append(f"<p>Nothing: {', '.join(map(escape, idle))}.</p>" if idle else "")
    chosen = sorted(result.kept, key=lambda draft: draft.request.id)  # a hash: a random choice that stays the same
    parts += ["<h2>Samples</h2>", cards([card(draft, images) for draft in chosen[:SAMPLES]])]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>datagen</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    write_atomic(path, page.encode(errors="backslashreplace"))


def table(rows: list[list[str]]) -> str:
    """A table of cells that are HTML; the first row is its head."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def counts_table(counts: dict) -> str:
    """Asked, kept and dropped by kind."""
    kinds = list(counts["asked"])
    rows = [["", *map(escape, kinds)], ["asked", *(f"{counts['asked'][kind]:,}" for kind in kinds)]]
    for name, taken in counts["dropped"].items():
        rows.append([f"dropped by {escape(name)}", *(f"{taken[kind]:,}" for kind in kinds)])
    rows.append(["<b>kept</b>", *(f"<b>{counts['kept'][kind]:,}</b>" for kind in kinds)])
    return table(rows)


def tokens_line(counts: dict) -> str:
    if "tokens" not in counts:
        return ""
    used, expected = counts["tokens"]["used"], counts["tokens"]["expected"]
    parts = [f"{used.get(k, 0):,} tokens of {k} (estimate {expected.get(k, 0):,})" for k in ("input", "output")]
    money = "" if counts["money"] is None else f"; {counts['money']:,.2f} paid by the given price"
    return f"<p>{', '.join(parts)}{money}.</p>"


def missing_list(counts: dict) -> str:
    rows = [
        f"<li>{number:,} without an answer: {escape(why)}</li>" for why, number in counts["without an answer"].items()
    ]
    return f"<ul>{''.join(rows)}</ul>" if any(counts["without an answer"].values()) else ""


def types_table(kept: list[Draft]) -> str:
    """The most frequent types of first questions."""
    counts = Counter(question_type(draft) for draft in kept).most_common(12)
    if not counts:
        return ""
    rows = ['<tr><th>first question</th><th>records</th><th class="bar"></th></tr>']
    for name, count in counts:
        width = 100 * count / counts[0][1]
        bar = f'<td class="bar"><i style="width: {width:.0f}%"></i></td>'
        rows.append(f"<tr><td>{escape(name)}</td><td>{count:,}</td>{bar}</tr>")
    return f"<h2>Questions</h2><table>{''.join(rows)}</table>"


def nouns_line(kept: list[Draft], nouns) -> str:
    """CHAIR of the descriptions that were kept, by its published rule."""
    rows = [(draft.turns[0][1], draft.request.item) for draft in kept if draft.request.kind == "detail"]
    rows = [(text, item) for text, item in rows if not item.scene]
    if not rows:
        return ""
    found = chair(rows, nouns)
    text = f"CHAIRi {found['CHAIRi']:.1%}, CHAIRs {found['CHAIRs']:.1%}"
    return f"<p>Descriptions that were kept: {text} ({found['mentions']:,} mentions in {found['texts']:,} texts).</p>"


def cards(found: list[str]) -> str:
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def card(draft: Draft, images: Path, reason: str = "") -> str:
    """A record with its image; with `reason`, why it was dropped."""
    item = draft.request.item
    why = f'<p class="why">{escape(reason)}</p>' if reason else ""
    name = f'<p class="small">{escape(draft.request.kind)}, {escape(item.image)}</p>'
    return f'<div class="card">{thumbnail(images, item.image)}{name}{why}{turns_html(draft.turns, draft.text)}</div>'


def turns_html(turns: Turns, text: str) -> str:
    if not turns:
        return f"<p>{escape(text[:600])}</p>"
    return "".join(f'<p class="q">{escape(question)}</p><p>{escape(answer)}</p>' for question, answer in turns)


def thumbnail(images: Path, name: str) -> str:
    """An image in the page itself; a note if it cannot be read."""
    try:
        image = open_image(resolve_inside(images, name))
    except BadImage as error:
        return f'<p class="why">{escape(str(error))}</p>'
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'
