"""Benchmarks: reading published files, scores by hand, files for servers, corrupted files, graders."""

import base64
import json
import random
import zipfile
from xml.etree import ElementTree

import benchmarks
import eval_faults
import pytest
from benchmarks import MAKERS, lines, write

import eval as evaluation
from evaluation import captions, grader, scores, submissions
from evaluation.choice_readers import unpack_images
from evaluation.predictions import Item, read_predictions
from evaluation.tasks import TASKS, build_prompt, read_items
from inputs.records import DataError


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "meteor_tool", lambda: None)


@pytest.mark.parametrize("task", MAKERS)
def test_the_truth_itself_scores_best(task, tmp_path):
    """Read, answered and scored; and what is right is never worth less than what is half right."""
    references, rows = MAKERS[task](tmp_path, random.Random(0), 8)
    items = read_items(task, references)
    half = TASKS[task].score(items, read_predictions(write(tmp_path / "p.json", rows), items))
    best = TASKS[task].score(items, [truth_of(task, item) for item in items])
    worst = TASKS[task].score(items, [None] * len(items))
    key = next(iter(best))
    assert worst[key] <= half[key] <= best[key] and half[key] > worst[key]
    assert best[key] == pytest.approx(scale(task)) or task in (
        "vqav2",
        "okvqa",
        "textvqa",
        "vizwiz",
        "coco",
        "textcaps",
    )
    assert not worst[key] or task in ("coco", "textcaps")


def truth_of(task, item):
    truth = item.truth
    if task == "gqa":
        return truth["answer"]
    if task == "mmbench":
        return truth[0]
    if isinstance(truth, list):
        return max(truth, key=truth.count)
    return truth


def scale(task):
    return {"mme": 400, "docvqa": 1}.get(task, 100)


@pytest.mark.parametrize("task, end", [
    ("vqav2", "Answer the question using a single word or phrase."),
    ("chartqa", "Answer the question with a single word."),
    ("vizwiz", "When the provided information is insufficient, respond with 'Unanswerable'.\n"
               "Answer the question using a single word or phrase."),
    ("mmbench", "Answer with the option's letter from the given choices directly."),
    ("coco", "Provide a one-sentence caption for the provided image."),
])  # fmt: skip
def test_questions_end_as_llava_asked_them(task, end, tmp_path):
    references, _ = MAKERS[task](tmp_path, random.Random(0), 3)
    item = read_items(task, references)[0]
    prompt = build_prompt(item, TASKS[task].suffix)
    assert prompt == (f"{item.text}\n{end}" if item.text else end)
    assert build_prompt(Item(1, prompt), TASKS[task].suffix) == prompt  # LLaVA's own lists have it already


def test_prompts_by_hand(tmp_path):
    item = read_items("textvqa", MAKERS["textvqa"](tmp_path / "t", random.Random(0), 2)[0])[0]
    assert item.text == "What says 0?\nReference OCR token: stop, 7"
    references, _ = MAKERS["textvqa"](tmp_path / "t", random.Random(0), 2)
    assert read_items("textvqa", references[:1])[0].text == "What says 0?"
    item = read_items("mmbench", MAKERS["mmbench"](tmp_path / "m", random.Random(0), 2)[0])[0]
    assert item.text.splitlines()[0] == "Which 0?" and item.text.splitlines()[4].startswith("D. ")
    item = read_items("mme", MAKERS["mme"](tmp_path / "e", random.Random(0), 1)[0])[0]
    assert item.text == "Is OCR 0 a?" and item.image == "OCR/000.png" and item.truth in ("yes", "no")
    item = read_items("scienceqa", MAKERS["scienceqa"](tmp_path / "s", random.Random(0), 2)[0])[1]
    assert item.text.startswith("Context: N/A\nQuestion: Which 1?\nOptions: (A) ") and item.image == "1/image.png"
    item = read_items("vqav2", MAKERS["vqav2"](tmp_path / "v", random.Random(0), 2)[0])[1]
    assert item.image == "COCO_val2014_000000000001.jpg"


def test_vqa_by_type(tmp_path):
    truths = [("cat", "other", 4), ("2", "number", 2), ("yes", "yes/no", 10)]
    rows = [
        {
            "question_id": i,
            "answer_type": kind,
            "question_type": "what",
            "answers": [{"answer": word}] * n + [{"answer": "x"}] * (10 - n),
        }
        for i, (word, kind, n) in enumerate(truths)
    ]
    items = read_items("vqav2", [write(tmp_path / "a.json", {"annotations": rows})])
    figures = scores.vqa(items, ["cat", "two", "Yes"])
    assert figures["overall"] == pytest.approx(100 * 1.6 / 3) and figures["answer type number"] == pytest.approx(60)
    assert figures["answer type yes/no"] == 0 and figures["min(n/3, 1)"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert scores.vqa(items, ["cat", None, "yes"])["overall"] == pytest.approx(200 / 3)


def test_gqa_as_its_own_scorer(tmp_path):
    def question(answer, structural, group, entailed=(), balanced=True):
        types = {"structural": structural, "semantic": "attr"}
        more = {"isBalanced": balanced, "entailed": list(entailed), "groups": {"global": group, "local": None}}
        return {"imageId": "1", "question": "?", "answer": answer, "types": types} | more

    rows = {
        "1": question("red", "query", "color", ["1", "4"]),
        "2": question("blue", "query", "color"),
        "3": question("yes", "verify", None),
        "4": question("no", "verify", None, balanced=False),
    }
    choices = {key: {"valid": ["red", "blue", "yes"], "plausible": ["red"]} for key in rows}
    items = read_items("gqa", [write(tmp_path / "q.json", rows), write(tmp_path / "c.json", choices)])
    figures = scores.gqa(items, ["Red.", "red", "no", "yes"])
    want = {
        "accuracy": 100 / 3,
        "binary": 0,
        "open": 50,
        "consistency": 0,
        "validity": 200 / 3,
        "plausibility": 200 / 3,
    }
    assert {key: figures[key] for key in want} == pytest.approx(want)
    # two reds for one, no blue for one: (1/1 + 1/1) x 2 / 2 / 100
    assert figures["distribution (lower is better)"] == pytest.approx(0.02)


def test_gqa_choices_of_what_two_things_share(tmp_path):
    more = {"imageId": "1", "question": "What is common?", "answer": "color", "types": {"detailed": "twoCommon"}}
    choices = {"1": {"valid": ["red"], "plausible": ["red"]}}
    items = read_items("gqa", [write(tmp_path / "q.json", {"1": more}), write(tmp_path / "c.json", choices)])
    for said, value in (("shape", 100), ("red", 0)):
        figures = scores.gqa(items, [said])
        assert (figures["validity"], figures["plausibility"]) == (value, value)


def test_of_vqa_rad_the_test_part_and_no_answer_is_none(tmp_path):
    row = {"qid": 1, "image_name": "a.jpg", "question": "q?", "answer_type": "OPEN", "answer": 2}
    rows = [row | {"phrase_type": "freeform"}, row | {"qid": 2, "phrase_type": "test_para"}]
    assert [(item.id, item.truth) for item in read_items("vqa-rad", [write(tmp_path / "r.json", rows)])] == [(2, "2")]
    assert len(read_items("vqa-rad", [write(tmp_path / "r.json", rows[:1])])) == 1
    for answer in (None, [], True):
        with pytest.raises(DataError, match=r"entry 1 \(1\): answer is"):
            read_items("vqa-rad", [write(tmp_path / "r.json", [row | {"answer": answer}])])


def test_a_caption_that_would_take_minutes_is_refused():
    with pytest.raises(DataError, match="question 1: a caption of 20,000 characters"):
        scores.captions([Item(1, "", truth=["a"])], [",a" * 10_000])


def test_pope_by_hand_and_a_missing_answer_is_wrong(tmp_path):
    rows = [{"question_id": i, "image": "1.jpg", "text": f"Is there a {i}?", "label": "no"} for i in (1, 2)]
    items = read_items("pope", [write(tmp_path / "coco_pope_random.json", lines(rows))])
    figures = scores.pope(items, ["", None])
    assert figures["random accuracy"] == 0 and figures["random yes ratio"] == 100  # to LLaVA's rule, nothing is a yes
    figures = scores.pope(items, ["No, there is not", "NO"])
    assert figures["random accuracy"] == 50 and figures["random accuracy (lmms-eval)"] == 50
    for item in items:
        item.truth = "yes"
    figures = scores.pope(items, ["Yes.", "yes"])  # to lmms-eval, "Yes." is wrong, but no miss; a missing answer is one
    assert (figures["random recall"], figures["random recall (lmms-eval)"]) == (100, 100)
    assert figures["random accuracy (lmms-eval)"] == 50 and figures["random yes ratio (lmms-eval)"] == 100
    assert scores.pope(items, [None, "yes"])["random recall (lmms-eval)"] == 50


def test_pope_by_llavas_list(tmp_path):
    references, _ = MAKERS["pope"](tmp_path, random.Random(0), 4)
    asked = [
        {
            "question_id": 100 + i,
            "image": item.image,
            "text": build_prompt(item, "END"),
            "category": item.groups["split"],
        }
        for i, item in enumerate(read_items("pope", references))
    ]
    listed = write(tmp_path / "llava_pope_test.jsonl", lines(asked))
    items = read_items("pope", [*references, listed])
    said = write(tmp_path / "said.jsonl", lines([{"question_id": row["question_id"], "text": "no"} for row in asked]))
    assert read_predictions(said, items) == ["no"] * 12 and len(read_items("pope", [listed])) == 12


@pytest.mark.skipif(not (eval_faults.DATA / "metrics/pope").exists(), reason="no label files of POPE")
def test_pope_on_its_label_files(tmp_path, command, capsys):
    files = sorted((eval_faults.DATA / "metrics/pope").glob("*.json"))
    items = read_items("pope", files)
    assert len(items) == 8910
    said = [{"question_id": item.id, "text": "Yes" if i % 3 else "No, there is none."} for i, item in enumerate(items)]
    path = write(tmp_path / "said.jsonl", lines(said))
    command(evaluation, "--score", "pope", "--predictions", path, "--references", *files)
    figures = {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    }
    for split in ("random", "popular", "adversarial"):
        pairs = [(i % 3 > 0, item.truth == "yes") for i, item in enumerate(items) if item.groups["split"] == split]
        hit, said_yes, true = sum(a and b for a, b in pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs)
        precision, recall = hit / said_yes, hit / true
        assert figures[f"{split} f1"] == pytest.approx(200 * precision * recall / (precision + recall), abs=1e-4)
        assert figures[f"{split} accuracy"] == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs), abs=1e-4)
        assert figures[f"{split} accuracy (lmms-eval)"] < figures[f"{split} accuracy"]


def test_answers_may_name_their_split(tmp_path):
    references, _ = MAKERS["pope"](tmp_path, random.Random(0), 4)
    items = read_items("pope", references)
    said = [{"question_id": 1, "category": split, "text": split} for split in ("popular", "random")]
    answers = read_predictions(write(tmp_path / "p.json", said), items)
    assert {item.id: answer for item, answer in zip(items, answers) if answer} == {
        "random/1": "random",
        "popular/1": "popular",
    }


def test_only_what_a_score_is_made_of_must_be_there(tmp_path):
    answers = ["cat"] * 10
    for task, content in {
        "vqav2": {"annotations": [{"question_id": 1, "answers": answers}]},
        "textvqa": {"data": [{"image_id": "a", "question": "What?", "answers": answers}]},
        "docvqa": {"data": [{"question_id": 1, "question": "What?", "answers": answers}]},
    }.items():
        items = read_items(task, [write(tmp_path / "reference.json", content)])
        assert next(iter(TASKS[task].score(items, ["cat"]).values())) in (1, 100)


def test_mme_by_hand(tmp_path):
    for name, row in (
        ("a.txt", "Is it? Please answer yes or no.\tYes\nIs it not?\tNo\n"),
        ("b.txt", "So?\tYes\nNo?\tNo\n"),
    ):
        write(tmp_path / "count" / name, row)
    items = read_items("mme", [tmp_path])
    figures = scores.mme(items, ["Yes", "no", "Yes", "yes"])
    assert figures["count"] == 75 + 50 and figures["perception"] == 125 and figures["cognition"] == 0
    results = tmp_path / "results"
    write(results / "count.txt", "a.png\tIs it? Please answer yes or no.\tYes\tyes\na.png\tIs it not?\tNo\tno\n")
    assert read_predictions(results, items) == ["yes", "no", None, None]
    assert [item.truth for item in read_items("mme", [results])] == ["yes", "no"]


def test_mmbench_vanilla_and_circular(tmp_path):
    references, _ = MAKERS["mmbench"](tmp_path, random.Random(0), 2)
    items = read_items("mmbench", references)
    said = [item.truth[0] for item in items]
    assert scores.mmbench(items, said) | {} == scores.mmbench(items, said)
    said[1] = "D" if said[1] != "D" else "A"  # a rotation of question 0
    figures = scores.mmbench(items, said)
    assert figures["vanilla"] == 100 and figures["circular"] == 50
    unpack_images(items, tmp_path / "images")
    assert (tmp_path / "images/1000001.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_captions_of_a_test_set_are_asked_for_but_not_scored(tmp_path):
    path = write(tmp_path / "info.json", {"images": [{"id": 3, "file_name": "3.jpg"}]})
    items = read_items("coco", [path])
    assert items[0].image == "3.jpg" and items[0].truth is None
    with pytest.raises(DataError, match="no answer to compare with"):
        scores.captions(items, ["a cat"])


# ---------------------------------------------------------------------------------------------------------------------
# servers


def test_what_servers_take(tmp_path, command):
    want = {
        "vqav2": {"question_id": 10, "answer": "2 dogs"},
        "vizwiz": {"image": "V_00000001.jpg", "answer": "2 dogs"},
        "gqa": {"questionId": "q1", "prediction": "two dogs"},
        "coco": {"image_id": 1, "caption": "Two dogs."},
        "docvqa": {"questionId": 1, "answer": "Two dogs."},
    }
    for task, row in want.items():
        references, rows = MAKERS[task](tmp_path / task, random.Random(0), 3)
        rows[1][eval_faults.text_key(rows[1])] = "Two dogs."
        predictions, out = write(tmp_path / "p.json", rows[:2]), tmp_path / f"{task}.json"
        argv = ["--score", task, "--predictions", predictions, "--references", *references, "--submission", out]
        command(evaluation, *argv)
        written = json.loads(out.read_text())
        assert written[1] == row and len(written) == (2 if task == "coco" else 3)


def test_the_table_of_mmbench(tmp_path, command):
    references, rows = MAKERS["mmbench"](tmp_path, random.Random(0), 2)
    predictions, out = write(tmp_path / "p.json", rows[1:]), tmp_path / "upload.xlsx"
    argv = ["--score", "mmbench", "--predictions", predictions, "--references", *references, "--submission", out]
    command(evaluation, *argv)
    with zipfile.ZipFile(out) as file:
        sheet = file.read("xl/worksheets/sheet1.xml").decode()
        assert all(ElementTree.fromstring(file.read(name)) is not None for name in file.namelist())
    assert sheet.count("<row>") == 9 and "<c><v>1000000</v></c>" in sheet and "prediction" in sheet
    first = out.read_bytes()
    command(evaluation, *argv)
    assert out.read_bytes() == first


@pytest.mark.parametrize("char", ["\0", "\uffff", "\ud800"])
def test_a_table_holds_no_character_that_xml_cannot(char, tmp_path, capsys):
    submissions.write_xlsx(tmp_path / "s.xlsx", [[1, f"<a{char}b>\n\U0001f600"]])
    assert "s.xlsx: 1 texts hold characters that XML cannot" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "s.xlsx") as file:
        sheet = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    assert "".join(sheet.itertext()) == "1<a\ufffdb>\n\U0001f600"


def test_no_server_takes_pope(tmp_path, command, capsys):
    references, rows = MAKERS["pope"](tmp_path, random.Random(0), 2)
    argv = ["--score", "pope", "--predictions", write(tmp_path / "p.json", rows), "--references", *references]
    with pytest.raises(SystemExit):
        command(evaluation, *argv, "--submission", tmp_path / "x")
    assert "no server takes pope" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# faulty files


@pytest.mark.parametrize("task", MAKERS)
def test_references_that_are_no_references_are_named(task, tmp_path):
    for content in (
        "",
        "{",
        "[]",
        "{}",
        "7",
        "[7]",
        '[{"question_id": 1}]',
        '{"annotations": [{"question_id": 1}]}',
        '{"data": [{}]}',
    ):
        path = write(tmp_path / "reference.json", content)
        with pytest.raises(DataError, match=r"reference\.json"):
            read_items(task, [path])


def test_questions_that_come_twice_or_are_in_one_file_only(tmp_path):
    references, _ = MAKERS["docvqa"](tmp_path, random.Random(0), 2)
    with pytest.raises(DataError, match="question 0 comes twice"):
        read_items("docvqa", [*references, *references])
    (asked, truths), _ = MAKERS["vqav2"](tmp_path / "v", random.Random(0), 3)
    content = json.loads(truths.read_text())
    content["annotations"].pop()
    with pytest.raises(DataError, match="question 20 is not in both"):
        read_items("vqav2", [asked, write(truths, content)])


def test_gqa_by_llavas_list_and_its_own_in_either_order(tmp_path):
    row = {"question_id": "1", "image": "a.jpg", "text": "Is it?\nEND"}
    listed = write(tmp_path / "llava.jsonl", lines([row]))
    own = write(tmp_path / "own.json", {"1": {"question": "Is it?", "imageId": "a", "answer": "yes"}})
    for paths in ([listed, own], [own, listed]):
        (item,) = read_items("gqa", paths)
        assert item.text == "Is it?\nEND" and scores.gqa([item], ["yes"])["accuracy"] == 100
    other = write(tmp_path / "other.jsonl", lines([row | {"question_id": "2"}]))
    with pytest.raises(DataError, match="question '2' is not among"):
        read_items("gqa", [own, other])


def test_images_of_test_dev_are_those_of_the_test_set(tmp_path):
    content = {"data_subtype": "test-dev2015", "questions": [{"question_id": 1, "image_id": 5, "question": "?"}]}
    assert read_items("vqav2", [write(tmp_path / "q.json", content)])[0].image == "COCO_test2015_000000000005.jpg"


def test_images_of_another_table_are_written_anew(tmp_path):
    for content in (b"half", b"one", b"another"):
        unpack_images([Item(1, "", "1.jpg", data=base64.b64encode(content).decode())], tmp_path)
        assert (tmp_path / "1.jpg").read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    for data in ("é", "A"):
        with pytest.raises(DataError, match="question 2: its image is not base64"):
            unpack_images([Item(2, "", "2.jpg", data=data)], tmp_path)


def test_a_line_of_mmbench_with_a_column_too_many_is_refused(tmp_path):
    path = write(tmp_path / "m.tsv", "index\tquestion\tA\tB\tanswer\n1\twhat\tx\ty\tz\tA\n")
    with pytest.raises(DataError, match=r"line 2: .*as many columns"):
        read_items("mmbench", [path])


def test_images_of_mme_may_have_brackets(tmp_path):
    write(tmp_path / "count/a[1].txt", "Is it?\tYes\nIs it not?\tNo\n")
    write(tmp_path / "count/a[1].jpg", "")
    assert {item.image for item in read_items("mme", [tmp_path])} == {"count/a[1].jpg"}


@pytest.mark.parametrize("task, content, why", [
    ("docvqa", {"data": [{"questionId": 1, "question": "?", "image": 5}]}, "question 1: its image is 5"),
    ("coco", {"images": [{"id": 1, "file_name": 5}]}, "question 1: its image is 5"),
    ("coco", {"images": [{"id": [1], "file_name": "a"}]}, "id is"),
    ("scienceqa", [{"id": 1, "image": 5, "conversations": []}], "question '1': its image is 5"),
    ("gqa", {"1": {"valid": [[1]], "plausible": []}}, "'1': .1. stands where a text"),
    ("gqa", {"1": {"question": "?", "imageId": "1", "answer": "a", "groups": [1]}}, "groups is .1., not dict"),
    ("gqa", {"1": {"question": "?", "imageId": "1", "answer": "a", "groups": {"global": []}}}, "stands where a text"),
    ("gqa", {"1": {"question": "?", "imageId": "1", "answer": "a", "types": "x"}}, "types is 'x', not dict"),
    ("gqa", {"1": {"question": "?", "imageId": "1", "answer": "a", "entailed": 5}}, "entailed is 5, not list"),
])  # fmt: skip
def test_what_is_no_text_in_references_is_named(task, content, why, tmp_path):
    with pytest.raises(DataError, match=why):
        read_items(task, [write(tmp_path / "reference.json", content)])


def test_corrupted_predictions(tmp_path):
    assert not eval_faults.fuzz(400, random.Random(5), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# graded by a language model


@pytest.fixture
def mmvet(tmp_path):
    content = {
        "v1_0": {"imagename": "0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "1.png", "question": "y?", "answer": "cat", "capability": ["rec"]},
    }
    return write(tmp_path / "mm-vet.json", content), write(tmp_path / "said.json", {"v1_0": "-1", "v1_1": "a cat"})


class Endpoint:
    """A server that speaks OpenAI's chat completions, and says what it is told to."""

    def __enter__(self):
        import http.server
        import threading

        outer, self.asked, self.replies = self, [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                content = outer.replies[(len(outer.asked) - 1) % len(outer.replies)]
                body = json.dumps(
                    {"choices": [{"message": {"content": content}}]} if content is not None else {}
                ).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_mmvet_is_graded_once_and_scored_offline(mmvet, tmp_path, command, capsys):
    references, predictions = mmvet
    grades = tmp_path / "grades.jsonl"
    argv = ["--score", "mmvet", "--predictions", predictions, "--references", references, "--grades", grades]
    with Endpoint() as server:
        server.replies = ["0.5", "1.0 (right)"]
        command(evaluation, *argv, "--grader", server.address)
        first = capsys.readouterr().out
        assert first.splitlines() == [
            "total 75.0000",
            "math 50.0000",
            "ocr 50.0000",
            "math_ocr 50.0000",
            "rec 100.0000",
        ]
        command(evaluation, *argv, "--grader", server.address)
        assert len(server.asked) == 2 and server.asked[0]["temperature"] == 0
        assert "-1 <AND> -5" in server.asked[0]["messages"][0]["content"]
    command(evaluation, *argv)
    assert capsys.readouterr().out == 2 * first
    content = grades.read_bytes()
    grades.write_bytes(content[:-5])  # killed while it wrote
    command(evaluation, *argv)
    said = capsys.readouterr()
    assert "total 25.0000" in said.out and "1 of 2 answers have no grade" in said.err
    assert grades.read_bytes() == content[: content.index(b"\n") + 1]


def test_an_endpoint_that_is_none_is_named(mmvet, tmp_path, command):
    references, predictions = mmvet
    argv = [
        "--score",
        "mmvet",
        "--predictions",
        predictions,
        "--references",
        references,
        "--grades",
        tmp_path / "g.jsonl",
    ]
    with pytest.raises(SystemExit, match=r"eval\.py: http://127\.0\.0\.1:9/chat/completions: "):
        command(evaluation, *argv, "--grader", "http://127.0.0.1:9")
    with Endpoint() as server, pytest.raises(SystemExit, match="is not a chat completion"):
        server.replies = [None]
        command(evaluation, *argv, "--grader", server.address)
    with pytest.raises(SystemExit, match="graded by a language model"):
        command(evaluation, *argv[:-2])


def test_grades_that_go_with_something_else_are_no_zeros(mmvet, tmp_path, command):
    references, predictions = mmvet
    argv = ["--score", "mmvet", "--predictions", predictions, "--references", references, "--grades", tmp_path / "g"]
    with Endpoint() as server:
        server.replies = ["1.0"]
        command(evaluation, *argv, "--grader", server.address, "--grader-model", "llama")
    with pytest.raises(SystemExit, match=r"/g: its grades, by 'llama', are of other answers, or --grader-model"):
        command(evaluation, *argv)
    command(evaluation, *argv, "--grader-model", "llama")


def test_mmvet_by_llavas_list_alone_has_nothing_to_grade_by(tmp_path, command):
    listed = write(tmp_path / "q.jsonl", lines([{"question_id": 0, "image": "a.jpg", "text": "Is it?"}]))
    for said in ({"0": "yes"}, {}):
        argv = ["--score", "mmvet", "--predictions", write(tmp_path / "p.json", said), "--references", listed]
        with pytest.raises(SystemExit, match=r"question 0: no answer to compare with.*mm-vet\.json"):
            command(evaluation, *argv, "--grades", tmp_path / "g")


@pytest.mark.parametrize("spoiled", [{"reply": 0.5}, {"asked": ["x"]}, {"grader": None}, {"id": 1}])
def test_a_grade_that_is_none_is_named(spoiled, tmp_path):
    row = {"id": "v1_0", "grader": "m", "asked": "x", "reply": "0.5"}
    assert grader.read_grades(write(tmp_path / "g", lines([row]))) == [row]
    with pytest.raises(DataError, match="line 2: is not a grade"):
        grader.read_grades(write(tmp_path / "g", lines([row, row | spoiled])))


@pytest.mark.parametrize("rule", [{}, {"llava_bench_conv": 5}, {"llava_bench_conv": {"role": "Assistant"}}, [5]])
def test_a_rule_that_is_none_is_named(rule):
    item = Item(0, "?", truth=("a cat", "a cat"), groups={"category": "conv"})
    with pytest.raises(DataError, match=r"--rule.* (has no llava_bench_conv|prompt is None)"):
        grader.build_requests("llavabench", [item], ["a dog"], rule, "m")


def test_the_key_does_not_go_where_an_endpoint_redirects_to(monkeypatch):
    import http.server
    import threading

    asked = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            if self.path.startswith("/short"):
                self.send_response(200)
                self.send_header("Content-Length", "100")
            else:
                self.send_response(302)
                self.send_header("Location", "/other")
            self.end_headers()
            self.wfile.write(b"{")

        def do_GET(self):
            asked.append(self.headers["Authorization"])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = http.server.HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ValueError, match=r"/v1/chat/completions: .*302"):
        grader.request_reply(f"{address}/v1", {})
    with pytest.raises(ValueError, match="/short/chat/completions: IncompleteRead"):
        grader.request_reply(f"{address}/short", {})  # a reply that ends before it is all there
    server.shutdown()
    server.server_close()
    assert asked == ["/v1/chat/completions", "/short/chat/completions"]


def test_llavabench_by_hand(tmp_path, command, capsys):
    asked = [
        {"question_id": i, "image": "1.jpg", "text": f"{i}?", "category": kind}
        for i, kind in enumerate(("conv", "detail"))
    ]
    context = [{"id": 1, "image": "1.jpg", "caption": ["a cat", "on a mat"]}]
    gpt = [{"question_id": i, "text": "a cat", "answer_id": f"g{i}"} for i in range(2)]
    names = (("questions", asked), ("context", context), ("answers_gpt4", gpt))
    references = [write(tmp_path / f"{name}.jsonl", lines(rows)) for name, rows in names]
    rule = write(
        tmp_path / "rule.json",
        {f"llava_bench_{kind}": {"prompt": "Rate!", "role": "Assistant"} for kind in ("conv", "detail")},
    )
    said = write(tmp_path / "said.jsonl", lines([{"question_id": i, "text": "a dog"} for i in range(2)]))
    argv = [
        "--score",
        "llavabench",
        "--predictions",
        said,
        "--references",
        *references,
        "--grades",
        tmp_path / "g",
        "--rule",
        rule,
    ]
    with Endpoint() as server:
        server.replies = ["8 6\nbecause", "9, 3\nso"]
        command(evaluation, *argv, "--grader", server.address)
    assert capsys.readouterr().out.splitlines() == ["all 52.9412", "conv 75.0000", "detail 33.3333"]
    text = server.asked[0]["messages"][0]["content"]
    assert text.startswith(
        "[Context]\na cat\non a mat\n\n[Question]\n0?\n\n[Assistant 1]\na cat\n\n[End of Assistant 1]"
    )
    assert text.endswith("[System]\nRate!\n\n")
    command(evaluation, *argv[:-4], "--submission", tmp_path / "batch.jsonl")
    assert json.loads((tmp_path / "batch.jsonl").read_text().splitlines()[1])["custom_id"] == "1"


@pytest.mark.parametrize(
    "reply, value", [("0.5", (0.5,)), ("1", (1,)), (" 0.3 | ", (0.3,)), ("1.5", None), ("good", None), ("", None)]
)
def test_replies_of_a_grader(reply, value):
    assert grader.read_correctness(reply) == value


@pytest.mark.parametrize(
    "reply, value", [("8 6", (8, 6)), ("8, 6\nx", (8, 6)), ("8", None), ("11 3", None), ("a b", None), ("", None)]
)
def test_replies_of_a_grader_of_two(reply, value):
    assert grader.read_pair(reply) == value


def test_every_benchmark_has_a_maker_or_a_grader():
    assert set(MAKERS) | set(grader.REQUESTS) == set(TASKS) and benchmarks.WORDS
