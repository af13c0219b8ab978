"""Answer files with two readings, with byte order marks, with MME's ids; and what is left out is said."""

import json

import pytest
from benchmarks import lines, write

import eval as evaluation
from evaluation.predictions import Item, read_predictions
from evaluation.tasks import read_items
from inputs.records import DataError

POPE = [
    {"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
    {"question_id": 2, "image": "1.jpg", "text": "Is there a dog in the image?", "label": "no"},
]
ANSWERS = {1: "Yes", 2: "No"}


@pytest.fixture
def pope(tmp_path):
    return write(tmp_path / "coco_pope_random.json", lines(POPE))


def answer_file(tmp_path, **keys):
    """A predictions file with these keys beside the id; a value may be a function of the question's row."""
    rows = []
    for row in POPE:
        values = {key: value(row) if callable(value) else value for key, value in keys.items()}
        rows.append({"question_id": row["question_id"]} | values)
    return write(tmp_path / "said.jsonl", lines(rows))


def question(row):
    return row["text"]


def right(row):
    return ANSWERS[row["question_id"]]


def score(command, capsys, task, predictions, *references):
    command(evaluation, "--score", task, "--predictions", predictions, "--references", *references)
    said = capsys.readouterr()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in said.out.splitlines()}, said.err


# ---------------------------------------------------------------------------------------------------------------------
# one answer a row


@pytest.mark.parametrize("key", ["answer", "prediction", "caption"])
def test_a_row_with_two_keys_that_may_hold_the_answer_is_refused(tmp_path, pope, command, key):
    predictions = answer_file(tmp_path, text=question, **{key: right})
    argv = ["--score", "pope", "--predictions", predictions, "--references", pope]
    with pytest.raises(SystemExit, match=rf"said\.jsonl: line 1 \(1\): has text and {key}: keep only the key"):
        command(evaluation, *argv)


def test_a_caption_beside_its_question_is_refused(tmp_path):
    rows = [{"image_id": 1, "text": "Describe the image.", "caption": "A red bus on a street."}]
    with pytest.raises(DataError, match=r"entry 1 .1.: has text and caption"):
        read_predictions(write(tmp_path / "said.json", rows), [Item(1, "", truth=["A red bus."])])


def test_in_an_answer_file_of_llava_the_answer_is_text_whatever_else_a_row_has(tmp_path, pope, command, capsys):
    predictions = answer_file(tmp_path, prompt=question, text=right, answer="maybe")
    assert score(command, capsys, "pope", predictions, pope)[0]["random accuracy"] == 100


@pytest.mark.parametrize("key", ["text", "answer", "prediction", "caption"])
def test_one_key_alone_is_the_answer(tmp_path, pope, command, capsys, key):
    predictions = answer_file(tmp_path, question=question, label="yes", **{key: right})
    assert score(command, capsys, "pope", predictions, pope)[0]["random accuracy"] == 100


def test_a_list_of_questions_is_not_scored_as_answers(tmp_path, pope, command):
    predictions = answer_file(tmp_path, text=lambda row: f"{row['text']}\nAnswer the question using a single word.")
    with pytest.raises(SystemExit, match=r"said\.jsonl: each answer is the question itself"):
        command(evaluation, "--score", "pope", "--predictions", predictions, "--references", pope)


# ---------------------------------------------------------------------------------------------------------------------
# answers that are scored, and look wrong


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>\n", " <end_of_turn>"])
def test_leftover_end_tokens_are_reported(tmp_path, pope, command, capsys, end):
    predictions = answer_file(tmp_path, text=lambda row: right(row) + end)
    assert "2 of 2 answers end with an end token" in score(command, capsys, "pope", predictions, pope)[1]
    predictions = answer_file(tmp_path, text=right)
    assert score(command, capsys, "pope", predictions, pope)[1] == ""


@pytest.mark.parametrize("wrong", ["It is a table.", "NO", "no!", "no\n", "A table. No."])
def test_answers_to_pope_that_count_as_yes_without_saying_it_are_reported(tmp_path, pope, command, capsys, wrong):
    predictions = answer_file(tmp_path, text=lambda row: "No, none." if row["question_id"] == 1 else wrong)
    expected = "1 of 2 answers do not say yes; LLaVA's rule counts them as yes, as it does NO and no! (first: 'random/2"
    assert expected in score(command, capsys, "pope", predictions, pope)[1]
    predictions = answer_file(tmp_path, text=lambda row: "No, none." if row["question_id"] == 1 else "YES!")
    assert score(command, capsys, "pope", predictions, pope)[1] == ""


# ---------------------------------------------------------------------------------------------------------------------
# MME's ids


@pytest.fixture
def mme(tmp_path):
    """A subtask with folders of its own for images and questions, as MME's artwork, and one without."""
    root = tmp_path / "MME"
    write(root / "artwork/questions_answers_YN/14777.txt", "Is it old? Please answer yes or no.\tYes\nNew?\tNo\n")
    write(root / "artwork/images/14777.jpg", "")
    write(root / "count/a.b.txt", "One?  Please answer yes or no.\tNo\nTwo?\tYes\n")
    write(root / "count/a.b.png", "")
    return root


END = "\nAnswer the question using a single word or phrase."
LISTED = [
    {"question_id": key, "image": key, "text": text + END, "category": key.split("/")[0]}
    for key, texts in {"artwork/images/14777.jpg": ["Is it old?", "New?"], "count/a.b.png": ["One?", "Two?"]}.items()
    for text in texts
]


def mme_answers(name="{}"):
    """Right answers to all four questions, with the prompts of LLaVA's list."""
    rows = zip(LISTED, ("Yes", "No", "No", "Yes"))
    return [{"question_id": name.format(q["question_id"]), "prompt": q["text"], "text": text} for q, text in rows]


def test_answers_of_llava_to_mme_carry_the_folder_of_the_image(mme, tmp_path, command, capsys):
    predictions = write(tmp_path / "said.jsonl", lines(mme_answers()))
    figures, _ = score(command, capsys, "mme", predictions, mme)
    assert (figures["artwork"], figures["count"], figures["perception"]) == (200, 200, 400)
    rows = [row | {"question_id": row["question_id"].replace("images/", "")} for row in mme_answers()]
    assert score(command, capsys, "mme", write(tmp_path / "said.jsonl", lines(rows)), mme)[0] == figures


def test_llavas_tables_for_mmes_tool_name_the_text_file(mme, tmp_path):
    write(tmp_path / "results/artwork.txt", "14777.txt\tNew? Please answer yes or no.\tNo\tYes\n")
    items = read_items("mme", [mme])
    assert read_predictions(tmp_path / "results", items) == [None, "Yes", None, None]


def test_llavas_list_of_mme_is_read_beside_the_folder_and_alone(mme, tmp_path, command, capsys):
    listed, predictions = write(tmp_path / "llava_mme.jsonl", lines(LISTED)), tmp_path / "said.jsonl"
    write(predictions, lines(mme_answers()))
    items = read_items("mme", [listed, mme])
    assert [item.truth for item in items] == ["yes", "no", "no", "yes"]
    assert [item.image for item in items[1:3]] == ["artwork/images/14777.jpg", "count/a.b.png"]
    figures, _ = score(command, capsys, "mme", predictions, listed, mme)
    assert figures["perception"] == 400
    own = [{"question_id": item.id, "text": "no"} for item in items]  # as eval.py --task mme writes them
    assert read_predictions(write(tmp_path / "own.jsonl", lines(own)), items) == ["no"] * 4
    with pytest.raises(SystemExit, match=r"question artwork/images/14777.jpg/0: no answer to compare with"):
        command(evaluation, "--score", "mme", "--predictions", predictions, "--references", listed)
    with pytest.raises(DataError, match=r"x\.json: neither a folder of MME nor"):
        read_items("mme", [mme, write(tmp_path / "x.json", {"a": 1})])


def test_subtasks_of_mme_that_are_missing_from_the_sums_are_reported(mme, tmp_path, command, capsys):
    predictions = write(tmp_path / "said.jsonl", lines(mme_answers()))
    assert "12 of MME's 14 subtasks are not there" in score(command, capsys, "mme", predictions, mme)[1]


# ---------------------------------------------------------------------------------------------------------------------
# byte order marks


BOM = "\ufeff"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_changes_no_file(tmp_path, line_end):
    def read(task, bom):
        table = line_end.join(["index\tquestion\tA\tB\tanswer", "1\twhat\tx\ty\tA", ""])
        texts = {
            "mmbench": write(tmp_path / "m.tsv", bom + table),
            "pope": write(tmp_path / "coco_pope_random.json", bom + line_end.join(map(json.dumps, POPE))),
            "coco": write(tmp_path / "c.json", bom + json.dumps({"images": [{"id": 3, "file_name": "3.jpg"}]})),
        }
        write(tmp_path / "MME/count/a.txt", bom + line_end.join(["Is it?\tYes", "Is it not?\tNo"]))
        return read_items(task, [texts.get(task, tmp_path / "MME")])

    for task in ("mmbench", "pope", "coco", "mme"):
        assert read(task, BOM) == read(task, ""), task
    (tmp_path / "q.jsonl").write_text(BOM + json.dumps({"question_id": 1, "text": "Red?"}) + line_end)
    assert evaluation.read_questions(tmp_path / "q.jsonl") == [{"question_id": 1, "text": "Red?"}]
    rows = [{"question_id": row["question_id"], "text": right(row)} for row in POPE]
    said = write(tmp_path / "said.jsonl", BOM + line_end.join(map(json.dumps, rows)))
    assert read_predictions(said, read("pope", "")) == ["Yes", "No"]
    (tmp_path / "count.txt").write_text(f"{BOM}a.png\tIs it?\tYes\tyes{line_end}")
    assert read_predictions(tmp_path, read("mme", ""))[0] == "yes"


def test_a_table_in_utf_16_is_named(tmp_path):
    (tmp_path / "m.tsv").write_bytes("index\tquestion\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"m\.tsv: is not UTF-8 text"):
        read_items("mmbench", [tmp_path / "m.tsv"])


# ---------------------------------------------------------------------------------------------------------------------
# what readers leave out


def test_questions_that_a_reader_leaves_out_are_counted(tmp_path, capsys):
    row = {"qid": 1, "image_name": "a.jpg", "question": "q?", "answer_type": "OPEN", "answer": "x"}
    rows = [row | {"q_lang": "en"}, row | {"qid": 2, "q_lang": "zh"}, row | {"qid": 3, "q_lang": "zh"}]
    assert len(read_items("slake", [write(tmp_path / "s.json", rows)])) == 1
    assert "s.json: 2 questions are not of the test set or not English: left out" in capsys.readouterr().err
    own = {key: {"question": f"Is it {key}?", "imageId": "a", "answer": "yes"} for key in "123"}
    listed = [{"question_id": "1", "image": "a.jpg", "text": "Is it 1?"}]
    paths = [write(tmp_path / "own.json", own), write(tmp_path / "list.jsonl", lines(listed))]
    assert len(read_items("gqa", paths)) == 1
    assert "2 official questions are not in LLaVA's list: left out" in capsys.readouterr().err


def test_images_without_ocr_tokens_are_counted(tmp_path, capsys):
    data = [{"image_id": f"im{i}", "question": "What?", "answers": ["a"] * 10} for i in range(3)]
    paths = [write(tmp_path / "val.json", {"data": data})]
    paths.append(write(tmp_path / "ocr.json", {"data": [{"image_id": "im0", "ocr_tokens": ["stop"]}]}))
    assert read_items("textvqa", paths)[1].text == "What?\nReference OCR token: "
    assert "2 questions are about an image without OCR tokens" in capsys.readouterr().err


def test_images_without_a_caption_are_counted(tmp_path, capsys):
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]}
    content["annotations"] = [{"image_id": 0, "caption": "a cat"}]
    assert len(read_items("coco", [write(tmp_path / "c.json", content)])) == 1
    assert "c.json: 2 images have no caption: left out" in capsys.readouterr().err


def test_a_list_without_official_questions_leaves_none_out(tmp_path, capsys):
    listed = [{"question_id": str(i), "image": "a.jpg", "text": f"Is it {i}?"} for i in range(2)]
    assert len(read_items("gqa", [write(tmp_path / "list.jsonl", lines(listed))])) == 2
    assert capsys.readouterr().err == ""


def test_unbalanced_questions_of_gqa_are_counted(tmp_path, capsys):
    own = {key: {"question": "q?", "imageId": "a", "answer": "yes", "isBalanced": key == "1"} for key in "123"}
    read_items("gqa", [write(tmp_path / "own.json", own)])
    assert "2 questions are not balanced" in capsys.readouterr().err


def test_a_medical_dialogue_is_not_cut_to_its_first_question(tmp_path):
    turns = [{"from": who, "value": who} for who in ("human", "gpt", "human", "gpt")]
    row = {"id": 1, "image": "a.jpg", "answer_type": "OPEN", "conversations": turns}
    with pytest.raises(DataError, match="not one question and one answer"):
        read_items("slake", [write(tmp_path / "m.json", [row])])


@pytest.mark.parametrize(
    "task, read, vague",
    [
        ("mme", "Yes.", "Maybe"),
        ("scienceqa", "B", "b"),
        ("mmbench", "(B)", "A or B"),
        ("seed", "B", "B. cat"),
        ("seed", "B", "B\n"),
    ],
)
def test_answers_that_name_no_option_are_reported(task, read, vague, capsys):
    items = [Item(i, "q?", options={"A": "dog", "B": "cat"}) for i in range(3)]
    evaluation.report_answers(task, items, [read, vague, vague])
    assert "2 of 3 answers" in (said := capsys.readouterr().err) and "(first: 1)" in said
    evaluation.report_answers(task, items, [read] * 3)
    assert capsys.readouterr().err == ""


def test_keys_of_own_questions_that_are_not_read_are_named(tmp_path, capsys):
    rows = [{"question_id": i, "text": "Which?", "choices": ["a", "b"]} for i in range(2)]
    evaluation.read_questions(write(tmp_path / "q.jsonl", lines(rows)))
    assert "q.jsonl: keys that are not read: 'choices' (2)" in capsys.readouterr().err
