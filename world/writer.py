"""Write a world to a folder: images, LLaVA's JSON for training, and questions about held-out scenes.

    captions.json     one caption per image, for stage 1 and for CLIP
    instruct.json     dialogues about the images, for stage 2
    text.json         dialogues about written notes instead of images, for the decoder of stage 0
    questions.jsonl   questions about held-out images, for eval.py
    scenes.jsonl      the objects of every image with their boxes

The same arguments write the same bytes, and a larger world begins with the smaller one.
"""

import itertools
import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from world.drawing import SHIFTS, draw_scene
from world.language import DESCRIBE, FAMILIES, make_dialogues, write_caption, write_notes
from world.scenes import make_scene

FAMILY_METRICS = {"description": "objects_f1"}  # see probes.METRICS; eval.py scores the others by exact match


def write_world(out: Path, n: int, seed: int, side: int, questions: int, turns: int, shift: str = "none"):
    """Write `n` training images and `questions` held-out questions with their images.

    Args: side: side of an image in pixels; turns: questions per dialogue; shift: a key of drawing.SHIFTS.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = make_questions(seed, questions)
    asked = sorted({int(Path(row["image"]).stem) for row in rows})
    scenes = draw_images(range(n), seed, False, side, out, shift) + draw_images(asked, seed, True, side, out, shift)
    captions, instructions, texts = [], [], []
    for index in tqdm(range(n), "text", unit="scene"):
        caption, dialogues, text = make_records(seed, index, turns)
        captions.append(caption)
        instructions += dialogues
        texts += text
    for name, lines in (("scenes", scenes), ("questions", rows)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, records in (("captions", captions), ("instruct", instructions), ("text", texts)):
        (out / f"{name}.json").write_text(json.dumps(records, indent=0))


def image_path(seed: int, index: int, held_out: bool) -> str:
    """Return the path of a scene's image, relative to the world's folder."""
    return f"{'heldout' if held_out else 'train'}-{seed}/{index // 1000:04d}/{index:07d}.png"


def draw_images(indices, seed: int, held_out: bool, side: int, out: Path, shift: str) -> list[dict]:
    """Draw scenes on all cores; return their rows of scenes.jsonl."""
    draw = partial(draw_image, seed=seed, held_out=held_out, side=side, out=out, shift=shift)
    name = "held-out images" if held_out else "images"
    with ProcessPoolExecutor(os.cpu_count(), initializer=leave_signals_to_parent) as pool:
        try:
            drawn = pool.map(draw, indices, chunksize=64)
            return list(tqdm(drawn, desc=name, total=len(indices), unit="image"))
        except BaseException:  # after a signal or an error, do not draw the remaining images
            pool.shutdown(cancel_futures=True)
            raise


def leave_signals_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def draw_image(index: int, seed: int, held_out: bool, side: int, out: Path, shift: str) -> dict:
    """Draw scene `index` into its file; return its row of scenes.jsonl, in which the objects are called "things"."""
    scene, _ = make_scene(seed, index, held_out)
    name = image_path(seed, index, held_out)
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    SHIFTS[shift](draw_scene(scene, side), index).save(path, compress_level=1)
    objects = [asdict(obj) | {"box": [round(v, 4) for v in obj.box]} for obj in scene.objects]
    return {"image": name, "background": scene.background, "things": objects}


def make_records(seed: int, index: int, turns: int) -> tuple[dict, list[dict], list[dict]]:
    """Return the records of training scene `index`: one caption, its dialogues, and its text-only records."""
    scene, rng = make_scene(seed, index, held_out=False)
    name, image = f"{seed}-{index}", {"image": image_path(seed, index, False)}

    def record(suffix: str, turns: list[tuple[str, str]], prefix: str = "", **more) -> dict:
        """Return a dialogue in LLaVA's JSON; `prefix` ("<image>\\n", or notes) opens the first question."""
        texts = [text for pair in turns for text in pair]
        texts[0] = prefix + texts[0]
        conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": name + suffix, **more, "conversations": conversations}

    caption = record("", [(DESCRIBE, write_caption(scene, rng))], "<image>\n", **image)
    dialogues = [
        record(f"-{i}", pairs, "<image>\n", **image) for i, pairs in enumerate(make_dialogues(scene, rng, turns))
    ]
    text = [
        record(f"-notes-{i}", pairs, write_notes(scene, rng) + "\n")
        for i, pairs in enumerate(make_dialogues(scene, rng, turns)[:2])
    ]
    text.append(record("-caption", [(write_notes(scene, rng), write_caption(scene, rng))], template="plain"))
    return caption, dialogues, text


def make_questions(seed: int, count: int, first: int = 0) -> list[dict]:
    """Return `count` held-out questions, equally many of each family, each about another scene, from `first` on."""
    rows = []
    for index in itertools.count(first):
        if len(rows) == count:
            return rows
        family = sorted(FAMILIES)[len(rows) % len(FAMILIES)]
        if pair := FAMILIES[family](*make_scene(seed, index, held_out=True)):
            image, (text, answer) = image_path(seed, index, True), pair
            row = {"question_id": len(rows), "image": image, "text": text, "answer": answer, "category": family}
            rows.append(row | ({"metric": FAMILY_METRICS[family]} if family in FAMILY_METRICS else {}))
