"""Caption metrics: by hand, against every recorded set, and against pycocoevalcap on random corpora."""

import importlib.util
import json
import random
import shutil
import time

import eval_faults
import pytest

import eval as evaluation
from evaluation import captions
from evaluation.ptb import ptb_words

METRICS = eval_faults.DATA / "metrics"
recorded = pytest.mark.skipif(
    not METRICS.exists(), reason=f"no recorded scores in {METRICS} (LLAVA_DATA names the folder)"
)
installed = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed"
)
SETS = ("coco_fakecap_126", "coco_human_loo_500", "clipscore_good", "clipscore_bad", "nlgeval")


@pytest.mark.parametrize("text, words", [
    ("A man's dog.", "a man 's dog"), ("Two dogs, one cat!", "two dogs one cat"), ("It isn't there", "it is n't there"),
    ('a "stop" sign', "a stop sign"), ("a black-and-white T-shirt", "a black-and-white t-shirt"),
    ("a cannot b", "a can not b"),
    ("cat/dog", "cat/dog"), ("A cat /", "a cat /"), ("in the U.S. now", "in the u.s. now"), ("Mr. Lee", "mr. lee"),
    ("a b ...", "a b"), ("3.5 and 1,000", "3.5 and 1,000"), ("", ""), ("...", ""), ("rock 'n' roll", "rock 'n' roll"),
    ("a  cat .", "a cat"), ("the dogs' toy", "the dogs toy"), ("a cat\non a mat", "a cat on a mat"),
    ("plan b.", "plan b."), ("½ cup", "1/2 cup"), ("it’s", "it 's"), ("a (b) c", "a -lrb- b -rrb- c"),
])  # fmt: skip
def test_words_of_a_caption(text, words):
    assert ptb_words(text) == words.split()


@recorded
@pytest.mark.parametrize("name", SETS)
def test_recorded_words(name):
    for item in eval_faults.golden(name)["items"] if name != "nlgeval" else ():
        for text, words in zip(
            [item["candidate"], *item["references"]], [item["candidate_ptb"], *item["references_ptb"]]
        ):
            assert ptb_words(text) == words.split(), text


@recorded
@pytest.mark.parametrize("name", SETS)
def test_recorded_scores(name):
    record = eval_faults.golden(name)
    items = record["items"]
    candidates = [item["candidate_ptb"].split() for item in items]
    ours = eval_faults.our_scores(candidates, [[ref.split() for ref in item["references_ptb"]] for item in items])
    for key, (score, each) in ours.items():
        assert score == pytest.approx(record["official_pycocoevalcap_1_2"][key], abs=1e-9), key
        assert each == pytest.approx([item["scores"][key] for item in items], abs=1e-9), key


def test_cider_by_the_golden_of_the_facts():
    refs = [["a cat sits on a mat", "a cat on a red mat"], ["a dog runs in the park", "the dog is running in a park"]]
    refs = [
        [text.split() for text in group]
        for group in [*refs, ["two birds fly over the sea", "birds flying above the ocean"]]
    ]
    a = [text.split() for text in ("a cat sits on a mat", "a dog runs in the park", "a man riding a horse")]
    b = [text.split() for text in ("a cat on a mat", "a dog in the park in the park", "birds fly over the ocean")]
    assert captions.cider(a, refs)[0] == pytest.approx(4.108312374088207, abs=1e-12)
    assert captions.cider(a, refs)[1] == pytest.approx([6.474963504082497, 5.849973618182124, 0], abs=1e-12)
    assert captions.cider(b, refs)[1] == pytest.approx(
        [5.402237448171839, 1.8536694686497501, 3.838852016969518], abs=1e-12
    )
    assert captions.cider(a[:1], refs[:1]) == (0, [0])  # one image has no idf


@installed
def test_random_corpora_against_pycocoevalcap():
    rng = random.Random(7)
    for _ in range(60):
        corpus = eval_faults.random_corpus(rng)
        assert eval_faults.furthest(eval_faults.our_scores(*corpus), eval_faults.reference_scores(*corpus)) < 1e-9


@installed
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java for the reference tokenizer")
def test_odd_captions_against_the_reference_tokenizer():
    # It reads all captions as one text: sorted, "b." is not followed by "A", which would make it the end of a sentence.
    texts = eval_faults.odd_captions(300, random.Random(1)) if METRICS.exists() else sorted(eval_faults.ODD)
    wrong = [(text, want) for text, want in zip(texts, eval_faults.java_words(texts)) if ptb_words(text) != want]
    assert len(wrong) <= len(texts) // 100, wrong


def test_a_missing_caption_is_worse_than_any(monkeypatch):
    monkeypatch.setattr(captions, "meteor_tool", lambda: None)
    refs = [["a cat on a mat", "the cat"], ["two dogs in the park"], ["a red bus"]]
    said = ["a cat on a mat", "two dogs in the park", "a cat"]
    base = captions.caption_scores(said, refs)
    for i in range(3):
        less = captions.caption_scores([None if i == j else text for j, text in enumerate(said)], refs)
        assert all(less[key] <= base[key] + 1e-12 for key in base), i


def test_a_missing_caption_scores_nothing_where_a_reference_has_no_words(monkeypatch):
    monkeypatch.setattr(captions, "meteor_tool", lambda: None)
    refs = [["."], ["a dog here"]]
    assert captions.caption_scores(["", None], refs)["ROUGE_L"] == 0.5  # as the official code has it
    assert captions.caption_scores([None, None], refs)["ROUGE_L"] == 0


@pytest.mark.parametrize("part", ["1", "1.5", "1-.5", "a"])
def test_a_long_chain_of_hyphens_is_cut_at_once(part):
    begin = time.perf_counter()
    assert ptb_words("-".join([part] * 60)) == ["-".join([part] * 60)]
    assert time.perf_counter() - begin < 2


def write_coco(folder, items):
    """Files of COCO's form from a recorded set."""
    results = [{"image_id": int(item["id"]), "caption": item["candidate"]} for item in items]
    content = {"images": [{"id": row["image_id"]} for row in results]}
    content["annotations"] = [{"image_id": int(i["id"]), "caption": text} for i in items for text in i["references"]]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "annotations.json").write_text(json.dumps(content))
    return ["--score", "coco", "--predictions", folder / "results.json", "--references", folder / "annotations.json"]


@recorded
@pytest.mark.parametrize("name", ["coco_fakecap_126", "coco_human_loo_500"])
def test_recorded_captions_on_the_command_line(name, tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr(captions, "meteor_tool", lambda: None)
    record = eval_faults.golden(name)
    items = record["items"]
    command(evaluation, *write_coco(tmp_path, items))
    printed = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    want = {key: f"{value:.4f}" for key, value in record["official_pycocoevalcap_1_2"].items()}
    assert printed == {key: value for key, value in want.items() if key in printed}
    assert set(want) - set(printed) <= {"METEOR"}
