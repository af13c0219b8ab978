"""The filters on planted faults, near duplicates against datasketch, object mentions against CHAIR's rule by hand."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from datagen_filters import FAULTS, make_drafts, plant_all

from datagen.asking import KINDS, Request, make_request, read_prompts, read_turns, write_turns
from datagen.duplicates import BANDS, PERMUTATIONS, ROWS, DuplicateFinder, jaccard, shingles, signature
from datagen.filters import FILTERS, Context, Draft, over_share
from datagen.items import Item
from datagen.nouns import chair, read_nouns


@pytest.fixture(scope="module")
def nouns():
    return read_nouns()


def test_planted_faults_are_found_and_clean_records_pass(nouns):
    """tests/tools/datagen_filters.py measures the same with 200 of each."""
    from datagen_filters import REFUSALS, SOURCES

    prompts = read_prompts()
    planted = plant_all(8, nouns, prompts | {"sources": SOURCES, "refusals": REFUSALS}, random.Random(1))
    rows = [("", draft) for draft in make_drafts(0, 40, nouns)] + planted
    for name, check in FILTERS.items():
        context, taken = Context(nouns, prompts), []
        for fault, draft in rows:
            if (name == "format" or not draft.fault) and check(draft, context):
                taken.append(fault)
        for fault in (fault for fault, (filter_name, _) in FAULTS.items() if filter_name == name):
            assert taken.count(fault) >= 7, (name, fault)
        assert taken.count("") <= (1 if name == "duplicate" else 0), name


def test_answers_are_read_as_they_were_written(nouns):
    for draft in make_drafts(0, 10, nouns):
        if draft.request.kind != "detail":
            assert read_turns(draft.request, write_turns(draft.turns)) == draft.turns
    item = Item("1", "1.png", ["a dog"])
    request = Request("0", "conversation", item)
    assert read_turns(request, "**Question 1:** Who?\n\n**Answer:** A dog:\nbig\n\nQ: Why?\nA: So.") == [
        ("Who?", "A dog:\nbig"),
        ("Why?", "So."),
    ]
    for text in ("", "A dog.", "Question: Who?", "Question: Who?\n===\nAnswer:", "Answer: A dog.", "Hi!\nQ: a?\nA: b"):
        with pytest.raises(ValueError):
            read_turns(request, text)


def test_a_system_prompt_can_go_before_the_first_question():
    item, prompts = Item("1", "1.png", ["a dog"], [("dog", 0, 0, 1, 0.5)]), read_prompts()
    usual, other = (make_request(item, "detail", "m", prompts, flag) for flag in (False, True))
    assert [message["role"] for message in usual.messages] == ["system", "user", "assistant", "user"]
    assert [message["role"] for message in other.messages] == ["user", "assistant", "user"]
    assert usual.messages[-1]["content"] == "a dog\n\ndog: [0.000, 0.000, 1.000, 0.500]"
    assert other.messages[0]["content"] == "\n\n".join(message["content"] for message in usual.messages[:2])
    assert usual.id != other.id


def test_signatures_are_those_of_datasketch():
    datasketch = pytest.importorskip("datasketch")
    for text in ("a", "a dog runs on a beach", " ".join(map(str, range(300)))):
        other = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1, scheme="legacy")
        for item in shingles(text):
            other.update(item.encode())
        assert np.array_equal(other.hashvalues, signature(shingles(text)))


def test_near_duplicates_are_those_of_exact_comparison():
    rng, words = random.Random(0), [f"w{i}" for i in range(60)]
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(20)]
    for text in texts[:10]:
        changed = text.split()
        changed[rng.randrange(50)] = "new"
        texts.append(" ".join(changed))
    finder, found = DuplicateFinder(), [None] * len(texts)
    for i, text in enumerate(texts):
        found[i] = finder.find(str(i), text, lambda key: 0.8)
    assert found == [None] * 20 + [str(i) for i in range(10)]
    assert PERMUTATIONS >= BANDS * ROWS
    pairs = [(shingles(texts[i]), shingles(texts[20 + i])) for i in range(10)]
    errors = [(signature(a) == signature(b)).mean() - jaccard(a, b) for a, b in pairs]
    assert np.abs(errors).max() < 4 * np.sqrt(0.25 / PERMUTATIONS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Two women ride bikes past a bus.", ["person", "bicycle", "bus"]),
        ("A baby elephant, a hot dog and a wine glass", ["elephant", "hot dog", "wine glass"]),
        ("a man in a bow tie near a toilet with its seat up", ["person", "tie", "toilet"]),
        ("An orange cat sleeps on oranges.", ["cat", "oranges"]),
        ("Mice, knives and sheep; no scarf", ["mouse", "knife", "sheep"]),
    ],
)
def test_mentions(nouns, text, names):
    assert [name for name, _ in nouns.mentions(text)] == names


def test_chair_counts_mentions_and_texts(nouns):
    item = SimpleNamespace(captions=["a man with his puppy"], boxes=[("orange", 0, 0, 1, 1)])
    found = chair([("A dog and a cat, a cat.", item), ("A woman holds oranges.", item)], nouns)
    assert found == {"CHAIRi": 2 / 5, "CHAIRs": 1 / 2, "mentions": 5, "texts": 2}


def test_a_denied_object_is_no_false_mention(nouns):
    item, context = Item("1", "1.png", ["a dog"], [("dog", 0, 0, 1, 1)]), Context(nouns, None)
    request = make_request(item, "conversation", "", None)
    for answer, bad in (("No, there is no cat here.", ""), ("It isn't a cat, but a dog.", ""), ("No, a cat.", "cat")):
        assert bool(FILTERS["noun"](Draft(request, [("Is it?", answer)]), context)) == bool(bad), answer


def test_balance_leaves_no_kind_and_no_type_over_its_share():
    item = Item("1", "1.png", ["a dog"])
    ids = iter(random.Random(0).sample(range(1000, 2000), 110))
    drafts = [Draft(Request(str(next(ids)), "conversation", item), [("Is it red?", "Yes.")]) for _ in range(60)]
    drafts += [Draft(Request(str(next(ids)), "conversation", item), [("What is it?", "A dog.")]) for _ in range(20)]
    drafts += [Draft(Request(str(next(ids)), "detail", item), [("Describe it.", "A dog.")]) for _ in range(30)]
    gone = {id(draft) for draft, _ in over_share(drafts)}
    left = [draft for draft in drafts if id(draft) not in gone]
    counts = {kind: sum(draft.request.kind == kind for draft in left) for kind in KINDS}
    yes = sum(draft.turns[0][1] == "Yes." for draft in left)
    assert counts["detail"] == counts["conversation"] == 30 and 10 <= yes <= 20
