"""Precision and recall of datagen's filters on records of the embedded world, where truth is exact.

python tests/tools/datagen_filters.py [--count 200] [--photos photos.json]

Clean records are the templates' answers about world scenes. Into other records of the same kind a fault is planted, in
one of several ways each; every filter then sees all records, alone. Precision: of the clean
records and those with its own fault that it takes, the share of the latter (a record with another fault may well have
both). Recall: of the records with its fault, the share that it takes. With --photos, the captions that people
wrote are checked as if they were answers: whatever a filter takes there is a false alarm on real English.
"""

import argparse
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from datagen.asking import KINDS, Request, make_request, read_prompts, read_turns, write_turns  # noqa: E402
from datagen.filters import FILTERS, Context, Draft  # noqa: E402
from datagen.items import Item, name_of, read_items  # noqa: E402
from datagen.nouns import read_nouns  # noqa: E402
from datagen.templates import ask_templates  # noqa: E402
from world.language import write_caption  # noqa: E402
from world.scenes import SHAPES, make_scene  # noqa: E402

SOURCES = [  # as language models write them
    "According to the caption, {}", "The captions mention that {}", "Based on the bounding boxes, {}",
    "From the coordinates we can tell that {}", "As the description says, {}", "Judging by the provided text, {}",
    "The given information suggests that {}", "The bounding box on the left shows that {}",
    "It is stated in the caption that {}", "As described in the sentences, {}", "The object list says that {}",
    "The annotations show that {}", "In the provided description, {}", "Given the information available, {}",
    "From the image description, {}", "Based on the details provided, {}", "One of the captions states that {}",
    "These sentences tell us that {}", "The metadata says that {}", "The data provided shows that {}",
    "The text you have given says that {}", "Its coordinates are [0.10, 0.20, 0.30, 0.40], and {}",
    "The notes do not say more, but {}", "According to the text, {}",
    "The caption does not say it, but {}", "Looking at the bounding box coordinates, {}", "Per the annotation, {}",
    "The sentences describe how {}", "From the given captions it is clear that {}", "As mentioned in the captions, {}",
    "As per the provided details, {}", "The listed coordinates imply that {}",
    "The written description implies that {}",
    "Given these descriptions, {}", "In the image caption one reads that {}", "The provided context says that {}",
    "Going by the captions, {}", "The detected objects include this: {}", "The input text states that {}",
    "The context given is that {}", "Considering the provided bounding boxes, {}", "The facts provided say that {}",
    "The label data shows that {}", "In these captions, {}", "The prompt says that {}", "The description reads: {}",
    "From what I was told, {}", "Your notes say that {}",
]  # fmt: skip
REFUSALS = [
    "I'm sorry, but I cannot see the image.", "As an AI language model, I cannot view images.",
    "I am unable to determine this from the image.", "I apologize, but I can't answer that.",
    "Sorry, I don't have access to the image.", "I cannot assist with that request.",
    "It is not possible to tell from the information at hand.", "This cannot be determined from the image.",
    "I'm afraid I can't help with this.", "As a text-based assistant, I have no image to look at.",
    "I do not have the ability to see pictures.", "No image was provided, so I can only guess.",
    "I can't tell what it is.", "I'm not able to look at images.", "I cannot provide an answer to this question.",
    "My apologies, the image does not load.", "I could not identify any object.",
    "I'm just an AI and have no eyes.", "I won't answer this question.", "It's impossible to say without more details.",
    "Unfortunately, I do not have enough information to answer.", "I am an AI model and do not process images.",
    "There is not enough information to answer this question.", "The answer is unknown.",
    "I cannot view the picture you mention.", "I'm unable to view images directly.", "Sorry, I can't do that.",
    "As a language model, I can't see this.", "It is impossible to determine this from the image.",
    "I don't have any image to look at.", "I am sorry, this is beyond what I can do.", "I can't really say.",
    "There isn't enough context to answer.", "The image was not provided.", "I have no way to check this.",
    "I apologise for the confusion, but no answer is possible.", "I cannot comply with this request.",
    "Without seeing the image, I cannot answer.", "I don't have the capability to look at pictures.",
    "It can't be determined.", "As an artificial intelligence, I only read text.", "I was unable to find an answer.",
    "I'm afraid that's not something I know.", "I do not know.", "No picture has been attached.",
    "I cannot accurately describe it.", "I lack access to visual content.", "I could not tell you.",
]  # fmt: skip


NEW_SOURCES = [  # written after the filters were final
    "The captions do not mention more than that {}", "Using the coordinates, one finds that {}",
    "What the caption calls a scene shows that {}", "By the numbers of the boxes, {}",
    "The provided list shows that {}",
    "As the captioner notes, {}", "My information is that {}", "The bounding-boxes overlap where {}",
    "The sentence says that {}", "It was described to me that {}", "The annotators wrote that {}",
    "From the text descriptions, {}", "The given data does not say more than that {}", "As listed, {}",
    "The description mentions that {}", "In the data I have, {}",
]  # fmt: skip
NEW_REFUSALS = [
    "I am not able to see what is shown.", "I can't view it, so I will not guess.", "No image is available to me.",
    "Apologies, that is not something I can answer.", "I have no visual input.", "It can not be told.",
    "That is impossible to know.", "I am a language model without vision.", "I'm unable to comply.",
    "I don't see an image here.", "Please provide the image first.", "I cannot be sure what it is.",
    "As an AI, I have no opinion.", "I could not determine the answer.", "This question has no answer.",
    "Sorry, there is nothing I can say about it.",
]  # fmt: skip


def world_item(index: int) -> Item:
    scene, rng = make_scene(7, index, held_out=False)
    boxes = [(name_of(obj), *(min(1.0, max(0.0, v)) for v in obj.box)) for obj in scene.objects]
    return Item(f"world-{index}", f"{index}.png", [write_caption(scene, rng)], boxes, scene, whole=True)


def make_drafts(first: int, count: int, nouns) -> list[Draft]:
    """Clean drafts of all kinds about `count` scenes."""
    drafts = []
    for index in range(first, first + count):
        for kind in KINDS:
            request = make_request(world_item(index), kind, "", None)
            if turns := ask_templates(request, nouns):
                drafts.append(Draft(request, turns, text=write_turns(turns)))
    return drafts


# ---------------------------------------------------------------------------------------------------------------------
# faults: each function returns a draft with its fault, or None if the draft has no place for it


def with_answer(draft: Draft, rng: random.Random, change) -> Draft:
    """A draft with one of its answers changed."""
    turns = list(draft.turns)
    i = rng.randrange(len(turns))
    turns[i] = (turns[i][0], change(turns[i][1]))
    return replace(draft, turns=turns)


def plant_echo(draft: Draft, rng: random.Random, prompts) -> Draft:
    """A run of 12 to 25 words from the prompts, before or after an answer."""
    words = rng.choice([message["content"] for kind in KINDS for message in prompts[kind]]).split()
    size = min(len(words), rng.randint(12, 25))
    start = rng.randrange(len(words) - size + 1)
    run = " ".join(words[start : start + size])
    return with_answer(draft, rng, lambda answer: f"{run} {answer}" if rng.random() < 0.5 else f"{answer} {run}")


def plant_source(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    if draft.request.kind != "referring":
        return with_answer(
            draft, rng, lambda answer: rng.choice(prompts["sources"]).format(answer[:1].lower() + answer[1:])
        )


def plant_refusal(draft: Draft, rng: random.Random, prompts) -> Draft:
    return with_answer(draft, rng, lambda answer: rng.choice(prompts["refusals"]))


def plant_short(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    if draft.request.kind in ("detail", "reasoning"):
        return with_answer(draft, rng, lambda answer: " ".join(answer.split()[: rng.randint(1, 4)]))


def plant_long(draft: Draft, rng: random.Random, prompts) -> Draft:
    """True sentences about the scene in other words, until there are over 400 words."""
    scene, parts = draft.request.item.scene, []
    while len(" ".join(parts).split()) < 410:
        caption = write_caption(scene, rng)
        parts.append(f"Sentence {len(parts)}: {caption}")
    return with_answer(draft, rng, lambda answer: " ".join([answer, *parts]))


def plant_repetition(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    way, words = rng.randrange(3), draft.turns[-1][1].split()
    if way == 0 and len(words) >= 4:  # runs in circles at its end
        return replace(draft, turns=[*draft.turns[:-1], (draft.turns[-1][0], " ".join(words + words[-4:] * 3))])
    if way == 1 and len(words) >= 4:
        return replace(draft, turns=[*draft.turns[:-1], (draft.turns[-1][0], f"{' '.join(words)} {' '.join(words)}")])
    return replace(draft, turns=[*draft.turns, draft.turns[0]]) if way == 2 else None


def plant_format(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    """The text of the answer without one of its parts, with words around it, or cut."""
    if draft.request.kind == "detail":
        return None
    text, way = write_turns(draft.turns), rng.randrange(5)
    if way == 0:  # the last answer is missing
        text = text[: text.rindex("===\nAnswer:")]
    elif way == 1:
        text = text.replace("Answer:", "", 1)
    elif way == 2:
        text = re.sub(r"(Answer:\n).*", r"\1", text, count=1)
    elif way == 3:
        text = text.replace("Question:\n", "Question:\n<image>\n", 1)
    draft = replace(draft, text=text, turns=[], cut=way == 4)
    try:
        draft.turns = read_turns(draft.request, text)
    except ValueError as error:
        draft.fault = str(error)
    return draft


def plant_noun(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    """A shape that the scene does not have, in place of one it has, or in a sentence more."""
    absent = sorted({*SHAPES} - {obj.shape for obj in draft.request.item.scene.shapes})
    if not absent:
        return None
    new, shapes = rng.choice(absent), "|".join(SHAPES)
    affirmed = [i for i, (_, answer) in enumerate(draft.turns) if re.search(rf"\b({shapes})\b", answer)]
    affirmed = [i for i in affirmed if "There is no" not in draft.turns[i][1]]
    if not affirmed or rng.random() < 0.5:
        return with_answer(draft, rng, lambda answer: f"{answer.rstrip('.')}. There is also a {new}.")
    i, turns = rng.choice(affirmed), list(draft.turns)
    turns[i] = (turns[i][0], re.sub(rf"\b({shapes})\b", new, turns[i][1], count=1))
    return replace(draft, turns=turns)


def plant_box(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    """A box moved by 0.05 to 0.3, in pixels, or of an object of another shape."""
    item = draft.request.item
    if draft.request.kind != "referring":
        return None
    text = write_turns(draft.turns)
    boxes = re.findall(r"\[[^\]]*\]", text)
    old, way = rng.choice(boxes), rng.randrange(3)
    corners = [float(v) for v in old[1:-1].split(",")]
    if way == 0:
        shift = rng.choice((-1, 1)) * rng.uniform(0.05, 0.3)
        corners = [corners[0] + shift, corners[1], corners[2] + shift, corners[3]]
    elif way == 1:
        corners = [round(v * 336) for v in corners]
    else:
        own = next(box for box in item.boxes if all(abs(a - b) < 0.001 for a, b in zip(box[1:], corners)))
        others = [box for box in item.boxes if box[0].split()[-1] != own[0].split()[-1]]
        if not others:
            return None
        corners = list(rng.choice(others)[1:])
    return replace(draft, turns=read_turns(draft.request, text.replace(old, str([round(v, 3) for v in corners]))))


def plant_duplicate(draft: Draft, rng: random.Random, prompts) -> Draft | None:
    """The same record again under another id: in other case, a word longer, or with one word of 35 changed."""
    request = Request(draft.request.id[::-1], draft.request.kind, draft.request.item)
    words, way = draft.words.split(), rng.randrange(3)
    question, answer = draft.turns[-1]
    if way == 0:
        answer = answer.upper()
    elif way == 1 and len(words) >= 15:
        answer += " Indeed."
    elif way == 2 and len(words) >= 35:
        answer = answer.replace(" is ", " was ", 1) if " is " in answer else answer.replace(" a ", " one ", 1)
    else:
        return None
    return replace(draft, request=request, turns=[*draft.turns[:-1], (question, answer)])


FAULTS = {  # fault -> filter that should take it
    "echo": ("echo", plant_echo), "source": ("source", plant_source), "refusal": ("refusal", plant_refusal),
    "too short": ("length", plant_short), "too long": ("length", plant_long),
    "repetition": ("repetition", plant_repetition), "no answer": ("format", plant_format),
    "foreign noun": ("noun", plant_noun), "wrong box": ("box", plant_box),
    "near duplicate": ("duplicate", plant_duplicate),
}  # fmt: skip


def plant_all(count: int, nouns, prompts, rng: random.Random) -> list[tuple[str, Draft]]:
    """(fault, draft) for `count` drafts of each fault; for duplicates the original comes before, without a fault."""
    planted, pool = [], iter(make_drafts(10_000, 12 * count, nouns))
    for fault, (_, plant) in FAULTS.items():
        done = 0
        while done < count:
            draft = next(pool)
            changed = plant(draft, rng, prompts)
            if changed is not None:
                planted += [("", draft)] if fault == "near duplicate" else []
                planted.append((fault, changed))
                done += 1
    return planted


def main():
    """Print a row for each filter, and the false alarms on captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--new", action="store_true", help="plant wordings that the filters were not written for")
    parser.add_argument("--show", action="store_true", help="print what was missed or taken wrongly")
    args = parser.parse_args()
    nouns, prompts = read_nouns(), read_prompts()
    sources, refusals = (NEW_SOURCES, NEW_REFUSALS) if args.new else (SOURCES, REFUSALS)
    prompts |= {"sources": sources, "refusals": refusals}
    rows = [("", draft) for draft in make_drafts(0, 5 * args.count, nouns)]
    rows += plant_all(args.count, nouns, prompts, random.Random(0))
    clean = sum(not fault for fault, _ in rows)
    print(f"{clean:,} clean records, {len(rows) - clean:,} with a fault")
    for name, check in FILTERS.items():
        context, right, taken = Context(nouns, prompts), Counter(), Counter()
        for fault, draft in rows:
            if name != "format" and draft.fault:
                continue  # has no turns: "format" takes it first
            if reason := check(draft, context):
                taken[fault] += 1
                if args.show and FAULTS.get(fault, ("",))[0] != name:
                    print(f"  {name} took {fault or 'a clean record'}: {reason}: {draft.words[:200]!r}")
            elif FAULTS.get(fault, ("",))[0] == name and args.show:
                print(f"  {name} missed {fault}: {draft.words[-200:]!r}")
        own = [fault for fault, (filter_name, _) in FAULTS.items() if filter_name == name]
        right = sum(taken[fault] for fault in own)
        share = f"precision {right / max(1, right + taken['']):6.1%}, recall {right / (args.count * len(own)):6.1%}"
        others = {fault: number for fault, number in taken.items() if fault and fault not in own}
        print(f"{name:<11} {share}; took {taken['']} clean records, and of other faults {others}")
    if args.photos:
        check_captions(args.photos, nouns, prompts)


def check_captions(path: Path, nouns, prompts):
    """Print how many captions of photographs each filter takes; for "noun", each against its image's other captions."""
    items, taken, count = read_items([path], path.parent / "images", False, False), Counter(), 0
    context = Context(nouns, prompts)
    for item in items:
        for i, caption in enumerate(item.captions):
            others = replace(item, id=f"{item.id}-{i}", captions=item.captions[:i] + item.captions[i + 1 :])
            draft = Draft(make_request(others, "conversation", str(i), None), [("What does it show?", caption)])
            count += 1
            taken.update(name for name, check in FILTERS.items() if check(draft, context))
    print(f"{count} captions of photographs: {dict(taken)} taken")


if __name__ == "__main__":
    main()
