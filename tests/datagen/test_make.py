"""python -m datagen make: records from templates, models and endpoints; nothing lost or twice, no key anywhere."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from datagen_faults import KEY, check_once, fail_first, write_items
from fake_endpoint import FAULTS, FakeEndpoint

import data
import datagen.__main__ as script
from datagen import endpoint
from datagen.asking import KINDS, Request
from datagen.items import Item


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("DATAGEN_KEY", KEY)


@pytest.fixture
def make(command, tmp_path):
    """Run `python -m datagen make`; returns the folder of its results."""

    def call(*argv, out=tmp_path / "out"):
        command(script, "make", *argv, "--out", out)
        return out

    return call


def refusal(make, *argv, **more):
    with pytest.raises(SystemExit) as caught:
        make(*argv, **more)
    line = caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1, line
    return line


def fake(server, *more):
    return ["--endpoint", server.url, "--llm", "fake", "--yes", "--kinds", "conversation", "--timeout", 1, *more]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# templates


def test_templates_make_good_records_of_every_kind(make, command, tiny, tmp_path):
    argv = [tiny.world / "scenes.jsonl", "--images", tiny.world, "--kinds", *KINDS, "--n", 40]
    out = make(*argv)
    with pytest.raises(SystemExit) as caught:
        command(data, "check", out / "data.json", "--images", tiny.world)
    assert caught.value.code == 0
    records = json.loads((out / "data.json").read_text())
    kinds = {kind: sum(record["id"].endswith(kind) for record in records) for kind in KINDS}
    report = json.loads((out / "report.json").read_text())
    assert kinds == report["kept"] and min(kinds.values()) >= 25
    lost = sum(sum(taken.values()) for taken in report["dropped"].values()) + sum(report["without an answer"].values())
    assert len(records) + lost == 160
    assert (make(*argv, out=tmp_path / "again") / "data.json").read_bytes() == (out / "data.json").read_bytes()


def test_held_out_scenes_are_left_out(make, tiny, tmp_path, capsys):
    out = make(tiny.world / "scenes.jsonl", "--images", tiny.world)
    records = json.loads((out / "data.json").read_text())
    assert records and not any(record["image"].startswith("heldout-") for record in records)
    assert "held-out scenes are left out" in capsys.readouterr().err


def test_only_boxes_of_all_objects_say_what_is_not_there(make, tmp_path):
    rows = [{"id": str(i), "image": "red.png", "boxes": [["bus", 0, 0, 0.5, 0.5]]} for i in range(30)]
    source = write_items(tmp_path, 30)
    (tmp_path / "items.json").write_text(json.dumps(rows))
    text = (make(*source, "--kinds", "conversation") / "data.json").read_text()
    assert "Are there any" not in text and "How many buses are in the image?" in text and "There is a bus." in text


def test_the_report_loads_nothing_and_shows_text_as_text(make, tmp_path):
    source = write_items(tmp_path, 3)
    rows = json.loads((tmp_path / "items.json").read_text())
    rows[0]["captions"] = ["<script>alert(1)</script> a red car"]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    page = (make(*source, "--kinds", "detail") / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg;base64,") == 3


# ---------------------------------------------------------------------------------------------------------------------
# an endpoint


def test_an_endpoint_that_fails_in_twelve_ways(make, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 200_000)
    source = write_items(tmp_path, 36)
    with FakeEndpoint(fail_first, seconds=2.5, huge=endpoint.MOST_BYTES) as server:
        out = make(*source, *fake(server, "--workers", 12, "--filters", "format"))
    check_once(out, 36)
    assert set(FAULTS) <= server.seen.keys() and server.most_open <= 12 + server.seen["hang"] + server.seen["slow"]
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in "".join(capfd.readouterr())
    assert [path for path in out.rglob("*") if KEY.encode() in path.read_bytes()] == []
    before = server.tries.total()
    make(*source, *fake(server, "--filters", "format"))  # all is there: nothing is asked, the server is gone
    assert server.tries.total() == before


def test_other_options_are_other_requests(make, tmp_path, capsys):
    source = write_items(tmp_path, 3)
    with FakeEndpoint() as server:
        make(*source, *fake(server, "--max-tokens", 200))
        before = server.tries.total()
        make(*source, *fake(server, "--max-tokens", 200))
        assert server.tries.total() == before
        body = '{"max_tokens": null, "max_completion_tokens": 8000}'
        make(*source, *fake(server, "--body", body))
        assert server.tries.total() == 2 * before
    assert "at most 24,000" in capsys.readouterr().out


def test_an_answer_that_comes_byte_by_byte_is_late():
    """Each byte is in time; all of them would take ten seconds and more."""
    with FakeEndpoint(lambda key, attempt: "slow", seconds=1.0) as server:
        asked = Request("1", "detail", Item("1", "1.png"), ({"role": "user", "content": "a dog " * 9},))
        start = time.monotonic()
        with pytest.raises(endpoint.BadAnswer, match="no answer in time"):
            endpoint.Endpoint(server.url, "fake", timeout=0.5).call(asked)
    assert time.monotonic() - start < 5


def test_requests_that_are_given_up_are_named_and_asked_again(make, tmp_path, capfd):
    source = write_items(tmp_path, 6)
    with FakeEndpoint(lambda key, attempt: "empty" if int(key, 16) % 2 and attempt < 2 else "") as server:
        out = make(*source, *fake(server, "--tries", 2))
        given_up = len(read(out / "failures.jsonl"))
        assert 0 < given_up < 6 and f"{given_up} without an answer: an empty text" in capfd.readouterr().out
        make(*source, *fake(server, "--tries", 2))
    check_once(out, 6)
    assert server.tries.total() == 6 + 2 * given_up


@pytest.mark.parametrize(("status", "words"), [(401, "the key is refused"), (404, "no such address or model")])
def test_what_nobody_will_answer_ends_at_once(make, tmp_path, monkeypatch, status, words):
    def refuse(self, body, headers):
        calls.append(1)
        return status, {}, json.dumps({"error": {"message": f"no {KEY}"}}).encode()

    calls = []
    monkeypatch.setattr(endpoint.Endpoint, "post", refuse)
    with FakeEndpoint() as server:
        line = refusal(make, *write_items(tmp_path, 30), *fake(server, "--workers", 2))
    assert words in line and "0 answers are kept" in line and KEY not in line and len(calls) <= 2


def work_until_killed(command, source, server, out):
    os.setsid()
    command(script, "make", *source, *fake(server, "--workers", 3, "--filters", "format"), "--out", out)
    os._exit(0)


def test_kills_lose_no_answer_and_ask_none_twice(make, command, tmp_path):
    """Killed three times; the requests that were on the way are the only ones asked again."""
    source, out, rng, kills = write_items(tmp_path, 24), tmp_path / "killed", random.Random(0), 0
    with FakeEndpoint(delay=0.06) as server:
        while kills < 3:
            before = server.answered.total()
            child = multiprocessing.get_context("fork").Process(
                target=work_until_killed, args=(command, source, server, out)
            )
            child.start()
            while server.answered.total() == before and child.is_alive():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            assert not (out / "data.json").exists()
            assert len({row["custom_id"] for row in read(out / "answers.jsonl")}) == len(read(out / "answers.jsonl"))
        make(*source, *fake(server, "--filters", "format"), out=out)
        check_once(out, 24)
        assert server.tries.total() <= 24 + 3 * kills
        whole = make(*source, *fake(server, "--filters", "format"), out=tmp_path / "whole")
    assert (out / "data.json").read_bytes() == (whole / "data.json").read_bytes()


def test_rate_limits_hold_for_all_workers():
    free = endpoint.Endpoint("http://127.0.0.1:1/v1", "fake", per_minute=1200)
    never, start = multiprocessing.Event(), time.monotonic()
    assert all(free.wait_turn(never) for _ in range(5))
    assert 0.19 < time.monotonic() - start < 2
    headers = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert endpoint.retry_after(headers) == 0 and endpoint.retry_after({"Retry-After": "2.5"}) == 2.5
    assert endpoint.retry_after({}) is endpoint.retry_after({"Retry-After": "soon"}) is None


# ---------------------------------------------------------------------------------------------------------------------
# batches, a local model


def test_a_batch_is_written_and_its_results_are_read(make, tmp_path, capfd):
    source, batch = write_items(tmp_path, 5), tmp_path / "batch.jsonl"
    teacher = ["--llm", "fake", "--kinds", "conversation", "--filters", "format"]
    out = make(*source, *teacher, "--batch-file", batch)
    assert not (out / "data.json").exists()
    rows = read(batch)
    assert {row["url"] for row in rows} == {"/v1/chat/completions"} and rows[0]["body"]["model"] == "fake"
    lines = []
    for i, row in enumerate(rows):
        text = f"Question:\nWhat is it?\n===\nAnswer:\nVehicle {i} of five."
        choices = [{"message": {"content": text}, "finish_reason": "stop"}]
        lines.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": {"choices": choices}}})
    lines[3]["response"] = {"status_code": 500, "body": {"error": {"message": "oops"}}}
    other = lines[0] | {"custom_id": "unknown"}
    (tmp_path / "done.jsonl").write_text("\n".join(map(json.dumps, [*lines[::-1], lines[1], other])) + "\n{")
    make(*source, *teacher, "--batch-results", tmp_path / "done.jsonl")
    said = "".join(capfd.readouterr())
    assert "4 answers from" in said and "comes twice" in said and "belongs to no request" in said and "oops" in said
    records = json.loads((out / "data.json").read_text())
    assert [record["id"] for record in records] == [f"{i}-conversation" for i in (0, 1, 2, 4)]
    make(*source, *teacher, "--batch-file", tmp_path / "rest.jsonl")
    assert [row["custom_id"] for row in read(tmp_path / "rest.jsonl")] == [rows[3]["custom_id"]]


def test_a_local_model_is_asked(make, tiny, babbler, tmp_path, capfd):
    prompts = tmp_path / "prompts"
    for kind in KINDS:
        (prompts / kind).mkdir(parents=True)
        (prompts / kind / "system.txt").write_text("Red?")
    source = [tiny.world / "scenes.jsonl", "--images", tiny.world, "--kinds", "detail", "--n", 3]
    model = ["--llm", babbler, "--prompts", prompts, "--max-tokens", 8, "--filters"]
    out = make(*source, *model)
    rows = read(out / "answers.jsonl")
    assert len(rows) == 3 and all(row["text"] and row["input_tokens"] for row in rows)
    answers = {record["conversations"][1]["value"] for record in json.loads((out / "data.json").read_text())}
    assert answers == {row["text"].strip() for row in rows}
    assert "3 detail dropped" in refusal_output(make, capfd, *source, *model, "format")


def refusal_output(make, capfd, *argv):
    assert "no record passed" in refusal(make, *argv)
    return capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": 1, "image": "red.png", "boxes": [["car", 10, 20, 300, 400]]}], "is in pixels"),
        ([{"id": 1, "image": "red.png", "boxes": [["car", 0.5, 0.2, 0.1, 0.4]]}], "is it x, y, width, height?"),
        ([{"id": 1, "captions": ["a car"]}], "without an image"),
        ([{"id": 1, "image": "blue.png", "captions": ["a car"]}], "without an image: "),
        ([{"id": 1, "image": "../red.png", "captions": ["a car"]}], "leaves the images folder"),
        ([{"id": 1, "image": "red.png"}], "unknown format"),
        ([{"id": 1, "image": "red.png", "captions": [" "]}], "neither captions nor boxes"),
        (
            [{"id": 1, "image": "red.png", "captions": "a car"}, {"id": 1, "image": "b.png", "captions": []}],
            "two images",
        ),
        ({"questions": []}, "unknown format"),
    ],
)
def test_bad_items_are_refused_in_one_line(make, tmp_path, rows, words):
    source = write_items(tmp_path, 1)
    (tmp_path / "items.json").write_text(json.dumps(rows))
    line = refusal(make, *source)
    assert words in line and "items.json" in line


def test_bad_items_are_left_out_and_pixels_converted(make, tmp_path, capfd):
    source = write_items(tmp_path, 1)
    rows = [{"id": 1, "captions": ["a car"]}, {"id": 2, "image": "red.png", "boxes": [["car", 8, 0, 16, 32]]}]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    out = make(*source, "--kinds", "referring", "--pixels", "--skip-bad")
    assert "1 bad entries are left out (first: " in capfd.readouterr().err
    assert "[0.250, 0.000, 0.500, 1.000]" in (out / "data.json").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--endpoint", "http://127.0.0.1:9/v1", "--yes"], "refused; 0 answers are kept"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "no terminal to confirm the cost"),
        (["--endpoint", "http://example.com/v1", "--yes"], "the key would be sent unencrypted"),
        (["--endpoint", "https://me:secret@example.com/v1", "--yes"], "a user name or password"),
        (["--endpoint", "example.com", "--yes"], "not an address"),
        (["--offline", "--prompts", "nowhere"], "No such file"),
        (["--offline"], "no record passed the filters"),
    ],
)
def test_bad_endpoints_are_refused_in_one_line(make, tmp_path, flags, words, capfd):
    line = refusal(make, *write_items(tmp_path, 2), "--llm", "fake", "--price", 1, 2, *flags)
    assert words in line and "secret" not in line + "".join(capfd.readouterr())


def test_two_processes_cannot_share_a_folder(make, tmp_path):
    from datagen.store import Store

    held = Store(tmp_path / "out")
    line = refusal(make, *write_items(tmp_path, 1), "--llm", "fake", "--offline")
    assert "another process" in line and held
