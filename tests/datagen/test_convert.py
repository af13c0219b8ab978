"""`python -m datagen convert`: small files in the published shape of each data set become good records."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
from datagen import __main__ as datagen
from datagen.convert import convert_rows
from datagen.published import FORMATS, most_frequent, read_rows
from inputs import cli
from inputs.records import check_record

SHORT = "Answer the question using a single word or phrase."
ASK = {"question": "Is it red?", "image": "a.png"}
TEN = [{"answer": text, "answer_id": i} for i, text in enumerate(["no", "yes", "yes", "no", "yes", *["net"] * 2])]
DIALOGUE = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cup"}]
ANSWERED = ("What is it?", "a cup")
QUESTION = {"question_id": 7, "image_id": 9, "question": "Is it red?"}
COVER = {"imageURL": "http://x/a.gif", "questions": ["Who?", "What title?"], "answers": ["Ann", "Sun"], "title": "Sun"}
PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png", "split": "train"}
# name -> (files, image, question, answer) of the first record
PUBLISHED = {
    "vqav2": (
        [
            {"data_subtype": "train2014", "questions": [QUESTION]},
            {"annotations": [{"question_id": 7, "image_id": 9, "answers": TEN}]},
        ],
        "COCO_train2014_000000000009.jpg", f"Is it red?\n{SHORT}", "yes",
    ),
    "gqa": ([{"05": {"imageId": "12", "question": "Is it red?", "answer": "no"}}], "12.jpg", None, "no"),
    "textvqa": (
        [{"data": [{"image_id": "f0", "question_id": 0, "question": "Is it red?", "answers": ["a", "b", "b"]}]}],
        "f0.jpg", None, "b",
    ),
    "ocrvqa": ([{"761": COVER | {"split": 1}, "762": COVER | {"split": 3}}], "761.jpg", f"Who?\n{SHORT}", "Ann"),
    "docvqa": ([{"data": [{"questionId": 3, "docId": 5, **ASK, "answers": ["0.28"]}]}], "a.png", None, "0.28"),
    "chartqa": (
        [[{"imgname": "a.png", "query": "Is it red?", "label": "14"}]],
        "a.png", "Is it red?\nAnswer the question with a single word.", "14",
    ),
    "scienceqa": (
        [{"1": PROBLEM, "2": PROBLEM}, {"train": ["1"], "val": [], "test": ["2"]}],
        "1/image.png",
        "Context: N/A\nQuestion: Which?\nOptions: (A) a (B) b\n"
        "Answer with the option's letter from the given choices directly.", "B",
    ),
    "vqa-rad": (
        [[
            {"qid": 0, "image_name": "s.jpg", "question": "Is it red?", "answer": 2, "phrase_type": "freeform"},
            {"qid": 1, "image_name": "s.jpg", "question": "?", "answer": "no", "phrase_type": "test_freeform"},
        ]],
        "s.jpg", "Is it red?", "2",
    ),
    "slake": (
        [[
            {"qid": 0, "img_name": "x/s.jpg", "question": "Is it red?", "answer": "No", "q_lang": "en"},
            {"qid": 1, "img_name": "x/s.jpg", "question": "?", "answer": "肺", "q_lang": "zh"},
        ]],
        "x/s.jpg", "Is it red?", "No",
    ),
    "pathvqa": ([[ASK | {"image": "train_01", "answer": "no"}]], "train_01.jpg", "Is it red?", "no"),
    "sharegpt4v": ([[{"id": "1", "image": "coco/a.jpg", "conversations": DIALOGUE}]], "coco/a.jpg", *ANSWERED),
    "llavar": ([[{"id": "1", "image": "a.jpg", "conversations": DIALOGUE}]], "a.jpg", *ANSWERED),
    "svit": (
        [[{"image_id": 5, "conversations": [
            {"content": [{"from": "user", "value": "What is it?"}, {"from": "gpt", "value": "a cup"}]},
            {"content": [{"from": "user", "value": "Where?"}, {"from": "gpt", "value": "here"}]},
        ]}]],
        "VG_100K/5.jpg", *ANSWERED,
    ),
    "messages": (
        [[{"images": ["1.jpg"], "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "a cup"},
        ]}]],
        "1.jpg", *ANSWERED,
    ),
    "sharegpt": ([[{"conversations": [{"from": "human", "value": "What is it?"}, DIALOGUE[1]]}]], None, *ANSWERED),
}  # fmt: skip
PUBLISHED["okvqa"] = PUBLISHED["vqav2"]


@pytest.fixture
def write(tmp_path):
    def write(contents: list) -> list[Path]:
        paths = [tmp_path / f"{i}.json" for i in range(len(contents))]
        for path, content in zip(paths, contents):
            path.write_text(json.dumps(content))
        return paths

    return write


def flags(**values) -> Namespace:
    return Namespace(
        **{"images": None, "split": "train", "suffix": None, "merge": False, "all_languages": False} | values
    )


def test_every_format_has_an_example():
    assert PUBLISHED.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_becomes_records(name, write):
    files, image, question, answer = PUBLISHED[name]
    result = convert_rows(name, read_rows(name, write(files)), flags())
    first, texts = result.records[0], [turn["value"] for turn in result.records[0]["conversations"]][-2:]
    assert first.get("image") == image
    assert texts == [("<image>\n" if image else "") + (question or f"Is it red?\n{SHORT}"), answer]
    for record in result.records:
        check_record(record)
    others = {"ocrvqa": 2, "scienceqa": 1, "vqa-rad": 1, "slake": 1}  # of the test set, or not English
    assert sum(result.dropped.values()) == others.get(name, 0)


def test_questions_about_one_image_are_merged_with_one_suffix(write):
    result = convert_rows("ocrvqa", read_rows("ocrvqa", write(PUBLISHED["ocrvqa"][0])), flags(merge=True))
    (record,) = result.records
    values = [turn["value"] for turn in record["conversations"]]
    assert values == [f"<image>\nWho?\n{SHORT}", "Ann", "What title?", "Sun"]


def test_the_most_frequent_answer_is_chosen_and_the_first_of_several():
    assert most_frequent({"answers": ["b", "a", " a", "b", "", None]}) == "b"
    assert most_frequent({"answers": []}) is None


def test_what_is_left_out_is_counted_by_reason(write, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    row = {"imageId": "a", "question": "Is it red?", "answer": "no"}
    bad = [{"answer": " "}, {"question": None}, {"imageId": 5.5}, {"imageId": "b"}, {"question": "What is <image>?"}]
    rows = {"0": row} | {str(i): row | change for i, change in enumerate(bad, 1)} | {"9": "text"}
    result = convert_rows("gqa", read_rows("gqa", write([rows])), flags(images=tmp_path))
    assert [record["id"] for record in result.records] == ["gqa-0"]
    reasons = ["without an answer", "without a question", "without an image", "image not found in --images"]
    assert result.dropped == Counter([*reasons, "… <image> markers for … images", "not an object"])
    assert "0.json: '4': image not found in --images (b.jpg)" in result.first["image not found in --images"]


BAD_DIALOGUES = {
    "from 'function'": {"messages": [{"role": "user", "content": "a"}, {"role": "function", "content": "b"}]},
    "has videos": {"messages": [{"role": "user", "content": "a"}], "videos": ["a.mp4"]},
    "the last question has no answer": {"messages": [{"role": "user", "content": "a"}]},
    "is an address": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    },
    "without a dialogue": {"messages": []},
}


def test_messages_with_parts_keep_images_where_they_stand_and_bad_ones_are_named(write):
    parts = [
        {"type": "text", "text": "Left: "},
        {"type": "image", "image": "l.png"},
        {"type": "image", "image": "r.png"},
    ]
    good = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]}
    result = convert_rows("messages", read_rows("messages", write([[good, *BAD_DIALOGUES.values()]])), flags())
    (record,) = result.records
    assert record["image"] == ["l.png", "r.png"]
    assert record["conversations"][0]["value"] == "Left: <image>\n<image>\n"
    for reason, found in zip(BAD_DIALOGUES, result.first.values()):
        assert reason in found


def test_the_command_writes_a_file_that_data_py_finds_good(write, tmp_path, command, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "12.jpg")
    (path,) = write([{"05": {"imageId": "12", "question": "Is it red?", "answer": "no"}}])
    out = tmp_path / "out.json"
    run(monkeypatch, path, "--from", "gqa", "--out", out, "--images", tmp_path, "--merge")
    assert "1 records with 1 answers about 1 images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command(data, "check", out, "--images", tmp_path)
    assert stop.value.code == 0 and "all 1 records are good" in capsys.readouterr().out


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["datagen", "convert", *map(str, argv)])
    cli.run(datagen.main, "datagen")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("vqa3", {}, "--from vqa3: unknown format; there are vqav2, okvqa"),
        ("gqa", PUBLISHED["textvqa"][0][0], "'imageId' and 'question' missing, found no entries"),
        (
            "vqav2",
            PUBLISHED["gqa"][0][0],
            "not of vqav2: 'image_id' and 'question' missing, found no entries that it has; ",
        ),
        (
            "chartqa",
            PUBLISHED["docvqa"][0][0]["data"],
            "not of chartqa: 'imgname' and 'label' and 'query' missing, found",
        ),
        ("gqa", {"05": {"imageId": "12", "question": "Is it?"}}, "nothing of it can be used, see above"),
    ],
)
def test_a_file_of_another_format_ends_in_one_line(write, tmp_path, monkeypatch, name, content, error):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *write([content]), "--from", name, "--out", tmp_path / "out.json")
    assert error in stop.value.code and "\n" not in stop.value.code
    assert not (tmp_path / "out.json").exists()


def test_a_pickle_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path / "train_qa.pkl", "--from", "pathvqa", "--out", tmp_path / "out.json")
    assert "only JSON is read" in stop.value.code
