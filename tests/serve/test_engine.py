"""Continuous batching: every request gets the answer it gets alone, and leaves nothing behind."""

import queue
import random
import time
from pathlib import Path

import pytest
import torch

from data import load_image, render_dialogue
from formats.weights import load_model
from inputs.records import Turn
from inputs.tokenizer import Tokenizer
from llava import generate
from serve.engine import ROOM, Engine, Job
from variants.tuning import add_tuning


@pytest.fixture(scope="module")
def llava(babbler):
    return load_model(babbler), Tokenizer.load(babbler)


@pytest.fixture
def engine(llava):
    engine = Engine(*llava, rows=8)
    yield engine
    engine.close()
    assert engine.cache is None and not engine.active and not engine.waiting


def make_jobs(llava, world: Path, count: int) -> list[Job]:
    """Jobs of different lengths, with 0 to 2 images, half of them greedy."""
    model, tokenizer = llava
    names, draw = sorted(path.relative_to(world) for path in world.glob("train-0/**/*.png")), random.Random(0)
    jobs = []
    for i in range(count):
        images = [load_image(world, str(draw.choice(names)), model.config) for _ in range(i % 3)]
        question = "What is here? " * draw.randint(1, 20)
        prompt, _ = render_dialogue([Turn(question, None, len(images))], tokenizer, "llava_hf", 9)
        sampling = (0.9, draw.choice([0, 20]), draw.choice([0.8, 1.0]), i) if i % 2 else ()
        jobs.append(Job(prompt, images, draw.randint(5, 40), *sampling))
    return jobs


def answer_alone(llava, job: Job) -> list[int]:
    """The ids that llava.generate, which knows nothing of the engine, gives for a job."""
    model, features = llava[0], None
    with torch.inference_mode():
        if job.images:
            features = model.vision_features(torch.cat([image.pixels for image in job.images]))
        sampling = (job.temperature, job.top_k, job.top_p, torch.Generator().manual_seed(job.seed))
        return [i for (i,) in generate(model, [job.prompt], features, None, job.max_tokens, *sampling)]


def run(engine: Engine, jobs: list[Job]) -> list[tuple[str, str]]:
    """Submit jobs together; returns the text and the reason of each."""
    for job in jobs:
        job.pieces = queue.Queue()
        job.send = lambda piece, reason, job=job: job.pieces.put((piece, reason))
        engine.submit(job)
    return [wait(job) for job in jobs]


def wait(job: Job) -> tuple[str, str]:
    text, reason = "", ""
    while not reason:
        piece, reason = job.pieces.get(timeout=60)
        text += piece
    return text, reason


def test_concurrent_answers_are_those_given_alone(llava, tiny, engine):
    jobs = make_jobs(llava, tiny.world, 8)
    alone = [answer_alone(llava, job) for job in jobs]
    answers = run(engine, jobs)
    assert [job.ids for job in jobs] == alone
    assert len({len(job.prompt) for job in jobs}) > 4 and len({len(ids) for ids in alone}) > 4
    for (text, reason), ids, job in zip(answers, alone, jobs):
        assert text == llava[1].decode(ids).lstrip()
        assert reason == ("length" if len(ids) == job.max_tokens else "stop")


def test_a_tiny_temperature_and_a_failing_job_end_no_other(llava, tiny, engine):
    jobs = make_jobs(llava, tiny.world, 3)
    jobs[0].temperature, jobs[1].top_k, jobs[1].temperature = 1e-40, "many", 1.0
    alone = [answer_alone(llava, job) for job in (jobs[0], jobs[2])]
    reasons = [reason for _, reason in run(engine, jobs)]
    assert reasons[1] == "error" and "error" not in reasons[::2] and [jobs[0].ids, jobs[2].ids] == alone


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_stand_before_every_row(babbler, tiny, method):
    model = load_model(babbler)
    add_tuning(model, method, length=5)
    tuned = model, Tokenizer.load(babbler)
    jobs, engine = make_jobs(tuned, tiny.world, 6), Engine(*tuned, rows=3)
    alone = [answer_alone(tuned, job) for job in jobs]
    run(engine, jobs)
    engine.close()
    assert [job.ids for job in jobs] == alone


def test_jobs_that_come_and_go_change_no_answer(llava, tiny, engine):
    """20 jobs for 8 rows arrive one by one; a third is cancelled at a random time."""
    jobs, draw = make_jobs(llava, tiny.world, 20), random.Random(1)
    alone = [answer_alone(llava, job) for job in jobs]
    rows, step = [], engine.step
    engine.step = lambda: (rows.append(len(engine.active)), step())
    for i, job in enumerate(jobs):
        job.pieces = queue.Queue()
        job.send = lambda piece, reason, job=job: job.pieces.put((piece, reason))
        engine.submit(job)
        time.sleep(draw.random() * 0.01)
        if i % 3 == 2:
            engine.cancel(jobs[draw.randint(max(0, i - 8), i)])
    engine.cancel(jobs[-1])
    reasons = [wait(job)[1] for job in jobs]
    assert max(rows) >= 6 and len(set(rows)) > 4 and 1 <= reasons.count("cancelled") <= 8
    for job, reason, ids in zip(jobs, reasons, alone):
        assert job.ids == ids[: len(job.ids)] and (reason == "cancelled" or len(job.ids) == len(ids))


@pytest.mark.parametrize("text, stops, reason, pieces", [
    ("añ→b", (), "length", ["a", "ñ", "→", "b"]),  # characters of one, two and three tokens
    ("ab##c###d", ("###",), "stop", ["a", "b", "##c", ""]),
    ("ab##c", ("###", "xyz"), "length", ["a", "b", "##c"]), ("ab##", ("###",), "length", ["a", "b", "##"]),
    ("abab", ("ba",), "stop", ["a", ""]), ("a→"[:1], (), "length", ["a"]),
])  # fmt: skip
def test_pieces_are_whole_characters_without_stop_texts(llava, engine, monkeypatch, text, stops, reason, pieces):
    ids = [llava[1].codec.ranks[bytes([byte])] for byte in text.encode()]
    left = iter(ids)
    monkeypatch.setattr("serve.engine.sample_token", lambda *_: torch.tensor([next(left)]))
    job = Job([1, 2, 3], [], len(ids), stops=stops)
    sent = []
    job.send = lambda piece, reason: sent.append((piece, reason))
    engine.submit(job)
    while not sent or not sent[-1][1]:
        time.sleep(0.001)
    assert [piece for piece, _ in sent] == pieces and sent[-1][1] == reason
    assert job.ids == ids[: len(job.ids)]


def test_the_cache_holds_no_more_than_the_longest_job(llava, engine):
    """Its memory falls when a long job leaves, and with the last one it goes (see the fixture)."""
    found, pack = [], engine.pack

    def watch(*arguments):
        pack(*arguments)
        found.append((engine.cache and engine.cache.length, [job.read for job in engine.active]))

    engine.pack = watch
    run(engine, [Job([5] * 700, [], 2), Job([5] * 3, [], 30)])
    engine.close()
    assert found == [(700 + ROOM, [700]), (701 + ROOM, [701, 3]), (3 + ROOM, [3]), (None, [])]
