"""Test the scorers and the resume of eval.py on many random cases, and print how many agree as a table.

    python tests/tools/eval_faults.py                       everything that needs no model
    python tests/tools/eval_faults.py --only ptb            or meteor, corpora, speed, fuzz; with --model kills, batches
    python tests/tools/eval_faults.py --only kills --model out/speedrun/stage2 --world out/speedrun/world

`bash test.sh` runs a few cases of each instead.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/tools")]

import benchmarks  # noqa: E402

import eval as evaluation  # noqa: E402
from evaluation import answering, captions  # noqa: E402
from evaluation.ptb import ptb_words  # noqa: E402
from formats.weights import load_checkpoint  # noqa: E402
from inputs import cli  # noqa: E402
from training.ranks import Distributed  # noqa: E402

DATA = Path(os.environ.get("LLAVA_DATA", REPOSITORY / "../shared/data")).resolve()

# ---------------------------------------------------------------------------------------------------------------------
# captions


def golden(name: str) -> dict:
    return json.loads((DATA / "metrics" / f"golden_{name}.json").read_text())


def human_captions() -> list[str]:
    """All captions written by people: those of the recorded sets and of the photographs."""
    found = []
    for name in ("coco_human_loo_500", "coco_fakecap_126", "nlgeval", "clipscore_good", "clipscore_bad"):
        found += [text for item in golden(name)["items"] for text in (item["candidate"], *item["references"])]
    return found + [
        text for photo in json.loads((DATA / "coco-photos/photos.json").read_text()) for text in photo["captions"]
    ]


ODD = [  # grey, colour: the tokenizer must leave British spellings as they are
    "'s", "n't", "don't", "U.S.", "Mr. Lee", "a.m.", "3.5", "1,000", "1/2", "50%", "$5", "T-shirt", "(left)", "[sic]",
    '"stop"', "'quoted'", "...", "--", "-", ";", ":", "!", "?!", "cannot", "gonna", "o'clock", "rock 'n' roll",
    "it's", "St.", "No. 7", "etc.", "7up", "4x4", "e-mail", "b.", "A", "#1", "@", "&", "and/or", "12:30", "10am",
    "5'", '6"', "can't", "www.cats.com", "café", "–", "“curly”", "it’s", "grey", "colour", "dogs'", "Dr.", "vs.",
    "TV.", "1980s", "'80s", "*", "+",
]  # fmt: skip


def odd_captions(count: int, rng: random.Random) -> list[str]:
    """Human captions with odd words inserted, most of them ASCII."""
    base, found = human_captions(), []
    for _ in range(count):
        words = rng.choice(base).split()
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(ODD))
        found.append(" ".join(words) + rng.choice(["", ".", " .", "!"]))
    return found


def java_words(texts: list[str]) -> list[list[str]]:
    """The tokens of pycocoevalcap's tokenizer, which needs Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    cut = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [cut[i][0].split() for i in range(len(texts))]


def try_ptb(count: int, verbose: bool = False) -> list[tuple[str, str]]:
    rows = []
    for name, texts in (
        ("people's captions", human_captions()),
        ("with oddities", odd_captions(count, random.Random(0))),
    ):
        wrong = [
            (text, want, ptb_words(text)) for text, want in zip(texts, java_words(texts)) if ptb_words(text) != want
        ]
        for text, want, got in wrong if verbose else ():
            print(f"{text!r}\n  java {' '.join(want)}\n  ours {' '.join(got)}", file=sys.stderr)
        rows.append((f"tokenizer against Java's, {name}", f"{len(texts) - len(wrong):,} of {len(texts):,} alike"))
    return rows


def random_corpus(rng: random.Random) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions over a small vocabulary, so that n-grams are shared; candidates may be empty."""
    words = [f"w{i}" for i in range(rng.choice([3, 10, 50]))]

    def caption(least: int) -> list[str]:
        return rng.choices(words, k=rng.randint(least, 14))

    size = rng.randint(1, 12)
    return [caption(0) for _ in range(size)], [[caption(1) for _ in range(rng.randint(1, 5))] for _ in range(size)]


def reference_scores(candidates, references) -> dict[str, tuple[float, list[float]]]:
    """The scores by pycocoevalcap, of the corpus and of each image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    guesses = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    truth = {i: [" ".join(words) for words in group] for i, group in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, each = Bleu(4).compute_score(truth, guesses, verbose=0)
    found = {f"Bleu_{n + 1}": (bleu[n], each[n]) for n in range(4)}
    return found | {"ROUGE_L": Rouge().compute_score(truth, guesses), "CIDEr": Cider().compute_score(truth, guesses)}


def our_scores(candidates, references) -> dict[str, tuple[float, list[float]]]:
    found = {f"Bleu_{n}": scores for n, scores in enumerate(captions.bleu(candidates, references), 1)}
    return found | {"ROUGE_L": captions.rouge(candidates, references), "CIDEr": captions.cider(candidates, references)}


def furthest(ours: dict, theirs: dict) -> float:
    """The largest difference in any figure, of the corpus or of one image."""
    return max(
        abs(a - b) for key in ours for a, b in zip([ours[key][0], *ours[key][1]], [theirs[key][0], *theirs[key][1]])
    )


def try_meteor() -> list[tuple[str, str]]:
    """Compare METEOR by its reference tool with the recorded scores."""
    jar, alike, names = captions.meteor_tool(), 0, ("clipscore_good", "clipscore_bad", "nlgeval", "coco_fakecap_126")
    for name in names if jar else ():
        record = golden(name)
        candidates = [item["candidate_ptb"].split() for item in record["items"]]
        references = [[text.split() for text in item["references_ptb"]] for item in record["items"]]
        score, each = captions.meteor(jar, candidates, references)
        want = [record["official_pycocoevalcap_1_2"]["METEOR"], *(item["scores"]["METEOR"] for item in record["items"])]
        alike += all(f"{a:.4f}" == f"{b:.4f}" for a, b in zip([score, *each], want))
    return [("METEOR of recorded sets, by its own tool", f"{alike} of {len(names)} alike" if jar else "no tool here")]


def try_corpora(count: int) -> list[tuple[str, str]]:
    rng, worst, alike = random.Random(1), 0.0, 0
    for _ in tqdm(range(count), unit="corpus"):
        corpus = random_corpus(rng)
        ours, theirs = our_scores(*corpus), reference_scores(*corpus)
        worst = max(worst, furthest(ours, theirs))
        alike += all(f"{ours[key][0]:.4f}" == f"{theirs[key][0]:.4f}" for key in ours)
    text = f"{alike:,} of {count:,} print the same, {worst:.1e} apart at most"
    return [("BLEU, ROUGE-L, CIDEr-D against pycocoevalcap, random corpora", text)]


def try_speed(count: int) -> list[tuple[str, str]]:
    rng, base = random.Random(2), human_captions()
    candidates = [rng.choice(base) for _ in range(count)]
    references = [[rng.choice(base) for _ in range(5)] for _ in range(count)]
    begin = time.perf_counter()
    words, others = [*map(ptb_words, candidates)], [[*map(ptb_words, group)] for group in references]
    cut = time.perf_counter() - begin
    captions.cider(words, others)
    whole = time.perf_counter() - begin
    return [(f"CIDEr-D of {count:,} x 5 captions, one core", f"{whole:.1f} s, {cut:.1f} of them the tokenizer")]


# ---------------------------------------------------------------------------------------------------------------------
# corrupted prediction files

TEXTS, IDS = ("text", "answer", "prediction", "caption"), ("question_id", "questionId", "image_id", "qid", "image")


def drop(rows, rng):
    """(rows, required outcome: an error, a report or nothing, text that the message must contain)."""
    gone = rng.randrange(len(rows))
    return rows[:gone] + rows[gone + 1 :], "missing", ""


def drop_many(rows, rng):
    return [row for row in rows if rng.random() < 0.6] or rows[:1], "missing?", ""


def double(rows, rng):
    row = rng.choice(rows)
    rows = [*rows, dict(row)]
    rng.shuffle(rows)
    return rows, "error", str(key_of(row))


def double_with_another_answer(rows, rng):
    row = rng.choice(rows)
    return [*rows, row | {text_key(row): "yes"}], "error", str(key_of(row))


def stranger(rows, rng):
    row = dict(rng.choice(rows))
    row[id_key(row)] = rng.choice([99999999, -1, "nobody"])
    row.pop("prompt", None)
    return [*rows, row], "error", str(key_of(row))


def wrong_type(rows, rng):
    i, value = rng.randrange(len(rows)), rng.choice([7, 3.5, None, True, [], {}, ["yes"]])
    rows = [dict(row) for row in rows]
    rows[i][text_key(rows[i])] = value
    return rows, "error", str(key_of(rows[i]))


def wrong_id(rows, rng):
    i, value = rng.randrange(len(rows)), rng.choice([None, 3.5, True, [], {}])
    rows = [dict(row) for row in rows]
    rows[i][id_key(rows[i])] = value
    return rows, "error", f"entry {i + 1}"


def no_id(rows, rng):
    i = rng.randrange(len(rows))
    rows = [dict(row) for row in rows]
    del rows[i][id_key(rows[i])]
    return rows, "error", f"entry {i + 1}"


def no_text(rows, rng):
    i = rng.randrange(len(rows))
    rows = [dict(row) for row in rows]
    del rows[i][text_key(rows[i])]
    return rows, "error", str(key_of(rows[i]))


def empty_answer(rows, rng):
    i = rng.randrange(len(rows))
    rows = [dict(row) for row in rows]
    rows[i][text_key(rows[i])] = rng.choice(["", " ", "\n"])
    return rows, "empty", ""


def not_a_number(rows, rng):
    i = rng.randrange(len(rows))
    rows = [dict(row) for row in rows]
    name, key = f"entry {i + 1}", rng.choice([text_key(rows[i]), id_key(rows[i])])
    rows[i][key] = rng.choice([float("nan"), float("inf")])
    return rows, "error", name


def huge(rows, rng):
    i = rng.randrange(len(rows))
    rows = [dict(row) for row in rows]
    if rng.random() < 0.5:
        rows[i][text_key(rows[i])] = rng.choice("ab ") * 200_000
        return rows, "error", str(key_of(rows[i]))
    rows[i][id_key(rows[i])] = 10 ** rng.choice([30, 400])
    rows[i].pop("prompt", None)
    return rows, "error", ""


def not_objects(rows, rng):
    rows = list(rows)
    i = rng.randrange(len(rows))
    rows[i] = rng.choice([None, 7, "yes", [], ["yes"]])
    return rows, "error", f"entry {i + 1}"


def nothing(rows, rng):
    return rng.choice([[], {}, None, 7, "text"]), "error or missing", ""


def other_order(rows, rng):
    return rng.sample(rows, len(rows)), "same", ""


FAULTS = [
    drop,
    drop_many,
    double,
    double_with_another_answer,
    stranger,
    wrong_type,
    wrong_id,
    no_id,
    no_text,
    empty_answer,
]
FAULTS += [not_a_number, huge, not_objects, nothing, other_order]


def id_key(row: dict) -> str:
    return next(key for key in IDS if key in row)


def key_of(row: dict):
    return row[id_key(row)]


def text_key(row: dict) -> str:
    return next(key for key in TEXTS if key in row)


def score(task: str, predictions: Path, references: list[Path]) -> tuple[dict[str, float], str, str]:
    """Scores, stderr and error message of `eval.py --score`, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["eval.py", "--score", task, "--predictions", str(predictions), "--references", *map(str, references)]
    kept, sys.argv = sys.argv, argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(evaluation.main, "eval.py")
    except SystemExit as stop:
        return {}, err.getvalue(), str(stop.code)
    finally:
        sys.argv = kept
    figures = (line.rsplit(" ", 1) for line in out.getvalue().splitlines())
    return {name: float(value) for name, value in figures}, err.getvalue(), ""


MAY_RISE = ("yes ratio", "distribution", "Bleu")  # not measures of accuracy, or lowered by a bad caption


def judge(base: dict, figures: dict, report: str, error: str, expected: str, name: str) -> str:
    """The reason why an outcome is wrong; "" if it is right."""
    if error:
        if len(error.splitlines()) != 1 or not error.startswith("eval.py: "):
            return f"not one line: {error!r}"
        if "error" not in expected:
            return f"refused: {error}"
        return "" if not name or name in error or ascii(name)[1:-1] in error else f"{name} is not named in: {error}"
    if expected == "error":
        return "accepted"
    better = [
        key for key in base if figures.get(key, 0) > base[key] + 1e-4 and not any(word in key for word in MAY_RISE)
    ]
    if expected == "same":
        return "" if figures == base and not report else "another order, another score"
    if expected == "empty":
        return "" if "empty answer" in report else "not reported"
    if "missing?" in expected and figures == base and not report:
        return ""
    if "have no answer" not in report:
        return "not reported"
    return f"better with answers missing: {better}" if better else ""


def fuzz(count: int, rng: random.Random, folder: Path) -> list[str]:
    """The wrong outcomes of `count` corrupted predictions files of random tasks."""
    tasks, found = {}, []
    for task, make in benchmarks.MAKERS.items():
        references, rows = make(folder / task, rng, 6)
        path = benchmarks.write(folder / f"{task}.json", rows)
        tasks[task] = (references, rows, *score(task, path, references)[:2])
        assert tasks[task][2], task
    for number in tqdm(range(count), unit="file", disable=count < 500):
        task = rng.choice(list(tasks))
        references, rows, base, usual = tasks[task]  # usual: what is reported of the sound file
        fault = rng.choice(FAULTS)
        spoiled, expected, name = fault(rows, rng)
        path = folder / "spoiled.json"
        as_lines = (
            isinstance(spoiled, list)
            and spoiled
            and all(isinstance(row, dict) for row in spoiled)
            and rng.random() < 0.5
        )
        content = benchmarks.lines(spoiled) if as_lines else json.dumps(spoiled)
        if rng.random() < 0.1 and expected == "same":  # cut short, by a kill or a full disk
            content, expected = content[: rng.randrange(1, len(content) - 2)], "error or missing?"
        path.write_text(content)
        figures, report, error = score(task, path, references)
        if why := judge(base, figures, report.replace(usual, ""), error, expected, name):
            found.append(f"{number} {task} {fault.__name__}: {why}")
    return found


def try_fuzz(count: int) -> list[tuple[str, str]]:
    captions.meteor_tool = lambda: None  # a Java for each file would take hours
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(count, random.Random(3), Path(folder))
    for line in found[:20]:
        print(line, file=sys.stderr)
    return [("prediction files spoiled in 15 ways, 17 tasks", f"{count - len(found):,} of {count:,} as documented")]


# ---------------------------------------------------------------------------------------------------------------------
# runs that are killed; batches


def command(args, out: Path, *more) -> list[str]:
    world = args.world
    line = ["eval.py", "--model", args.model, "--questions", world / "questions.jsonl", "--images", world, "--out", out]
    return [sys.executable, *map(str, line), "--device", "cpu", *map(str, more)]


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def written(out: Path) -> int:
    """Bytes of answers in the parts; -1 while they are being merged."""
    try:
        return sum(path.stat().st_size for path in out.parent.glob("*.part-*"))
    except FileNotFoundError:
        return -1


def try_kills(args, count: int, ranks: int = 1) -> list[tuple[str, str]]:
    """Kill runs at random times and resume them until done; all files must equal those of an uninterrupted run."""
    rng, folder = random.Random(4), Path(tempfile.mkdtemp())

    def start(out: Path) -> subprocess.Popen:
        line = command(args, out, "--limit", 480, "--batch-size", 8)
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            line = [line[0], *launcher, *line[1:]]
        process = subprocess.Popen(
            line, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        before = written(out)
        while process.poll() is None and written(out) == before:
            time.sleep(0.01)  # it loads the model
        return process

    whole, ends, same, kills = folder / "whole/answers.jsonl", 0, 0, 0
    process, begin = start(whole), time.time()
    assert process.wait() == 0
    took = time.time() - begin
    with tqdm(total=count, unit="kill") as bar:
        while kills < count:
            out = folder / f"{ends}/answers.jsonl"
            while not out.exists() or list(out.parent.glob("*.part-*")):
                process = start(out)
                try:
                    process.wait(rng.uniform(0, 0.7) * took)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    bar.update()
            names = ("answers.jsonl", "manifest.json")
            same += all((out.parent / name).read_bytes() == (whole.parent / name).read_bytes() for name in names)
            ends += 1
    shutil.rmtree(folder)
    name = f"SIGKILL while it answers 480 questions, {ranks} rank{'s' * (ranks > 1)}"
    return [(name, f"{kills} kills in {ends} runs, {same} of {ends} end in the same bytes")]


def try_batches(args, count: int) -> list[tuple[str, str]]:
    """Wall time of answering one by one and in batches of 64, with image loading, without model loading."""
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(args.model, "cpu", torch.float32)
    questions, seconds, texts = evaluation.read_questions(args.world / "questions.jsonl")[:count], {}, {}
    ask = partial(
        answering.answer_batch, model, tokenizer, images=args.world, max_new_tokens=128, cost=answering.Cost()
    )
    make_row = partial(answering.llava_row, "model", evaluation.answer_metadata)
    with tempfile.TemporaryDirectory() as folder:
        for size in (64, 1):
            begin = time.perf_counter()
            out, ranks = Path(folder) / f"{size}.jsonl", Distributed("cpu")
            rows = answering.answer_all(questions, out, size, "model", ask, make_row, ranks)
            seconds[size], texts[size] = time.perf_counter() - begin, [row["text"] for row in rows]
    same = sum(a == b for a, b in zip(texts[1], texts[64]))
    ratio = (
        f"{seconds[1]:.1f} s alone, {seconds[64]:.1f} s in batches of 64: {seconds[1] / seconds[64]:.1f} times faster"
    )
    return [(f"{len(questions):,} questions, one core", f"{ratio}; {same:,} answers alike")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=("ptb", "meteor", "corpora", "speed", "fuzz", "kills", "batches"))
    add("--model", type=Path, help="for kills and batches: a speedrun's stage2")
    add("--world", type=Path, help="the world it is asked about")
    add("--count", type=int, help="how many trials instead of the usual number")
    add("--ranks", type=int, default=1, help="of the runs that are killed")
    add("--verbose", action="store_true", help="print every caption the tokenizers differ on")
    args = parser.parse_args()
    rows = []
    for name, usual in (
        ("ptb", 20_000),
        ("meteor", 4),
        ("corpora", 1000),
        ("speed", 5000),
        ("fuzz", 10_000),
        ("kills", 50),
        ("batches", 400),
    ):
        if args.only not in (None, name) or (name in ("kills", "batches") and not args.model):
            continue
        count = args.count or usual
        if name == "meteor":
            rows += try_meteor()
        elif name == "ptb":
            rows += try_ptb(count, args.verbose)
        elif name == "kills":
            rows += try_kills(args, count, args.ranks)
        elif name == "batches":
            rows += try_batches(args, count)
        else:
            rows += {"corpora": try_corpora, "speed": try_speed, "fuzz": try_fuzz}[name](count)
    for what, came in rows:
        print(f"| {what} | {came} |")


if __name__ == "__main__":
    main()
