"""Files at scale: an index equal to the JSON, mixtures in the promised shares, bad data named before any work."""

import io
import json
import multiprocessing
import pickle
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
import train
from clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from data import Records, collate
from formats.weights import load_model
from inputs import check, files, index, parallel
from inputs.index import RecordFile, read_records
from inputs.mixture import (
    GROUPED_STEPS,
    Source,
    batches,
    epochs,
    evenly,
    open_sources,
    order_of,
    read_shares,
    split_weight,
)
from inputs.records import DataError
from inputs.tokenizer import Tokenizer, train_bpe
from llava import LlavaConfig, TextConfig

TOKENIZER = train_bpe(["USER: What is this? ASSISTANT: a cat on a mat."] * 3, 50)
CONFIG = LlavaConfig(TextConfig(), CLIPVisionConfig(image_size=4, patch_size=2), template="llava_hf")


def record(question, answer, image=None, number="x"):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number} | ({"image": image} if image else {}) | {"conversations": messages}


def seen(name, count=1):
    return [record("<image>\nWhat?", "a cat " * (1 + i % 7), name, i) for i in range(count)]


def told(count=1):
    return [record("What?", "a cat " * (1 + i % 9), number=i) for i in range(count)]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Every index is kept in a folder, however small the file."""
    monkeypatch.setattr(index, "MIN_KEPT", 0)
    monkeypatch.setattr(files, "OUTPUT_ROOT", tmp_path / "out")
    return tmp_path / "out/index"


# ---------------------------------------------------------------------------------------------------------------------
# the index

HOSTILE = [
    "héé 👩‍👧 مرحبا \u2028 \u0000 \ufeff", '\\"]}{[,:', "\\u005d \\\\", "]" * 40, '"' * 33, "\\" * 31, "", "x" * 300,
    {"a": [[[{}]], [], {"b": [-1.5e10, 0, 1e5, True, None]}], "id": "7"}, 123, -5, 1e5, "s", None, True, [], {},
]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_scan_in_chunks_of_any_size_is_plain_json(indent, ascii_only, mark):
    text = mark + json.dumps(HOSTILE, ensure_ascii=ascii_only, indent=indent).encode() + b" \r\n\t"
    for chunk in (*range(1, 20), 31, 64, 200, 10_000):
        found = list(index.scan(Path("x"), io.BytesIO(text), chunk))
        assert [value for value, _, _ in found] == HOSTILE and not any(fault for _, fault, _ in found)
        assert [json.loads(text[start : start + size]) for _, _, (start, size) in found] == HOSTILE


@pytest.mark.parametrize("chunk", [1, 2, 7, 40, 10_000])
def test_a_spoiled_value_does_not_spoil_the_file(chunk):
    spoiled = ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1, "a": "]}"}', "9" * 5000, "NaN"]
    text = "[" + ", ".join(f'{{"n": {i}}}, {bad}' for i, bad in enumerate(spoiled)) + ', "last"]'
    found = list(index.scan(Path("x"), io.BytesIO(text.encode()), chunk))
    assert [value for value, fault, _ in found if not fault] == [*({"n": i} for i in range(5)), "last"]
    faults = [fault for _, fault, _ in found if fault]
    assert [word in fault for word, fault in zip(("NaN", "Infinity", "duplicate key", "digits", "NaN"), faults)] == [
        True
    ] * 5


@pytest.mark.parametrize("text, says", [
    ("[1, 2,]", "record 2"), ("[1 2]", "record 1"), ("[1, 2] 3", "Extra"), ('[1, "2]', "record 1"),
    ("[tru]", "record 0"), ('[{"a" 1}]', "record 0"), ("[1, 2", "record 2"), ('{"a": 1}\n{"a": 2}\n', "JSON Lines"),
    ("", "not JSON"),
    ("[" + "[" * 100_000, "deep"), ("[]", "at least one"), ("{}", "list"), ("[\x01]", "not JSON"),
    ('["\\x"]', "not JSON"), (b'["ok", "\xc3"]', "UTF-8"), (b'["ok", "\xc3', "UTF-8"),
    (b"\xff\xfe[\x00]\x00", "UTF-8"),
])  # fmt: skip
def test_what_is_no_list_of_values_is_refused_at_any_chunk(text, says):
    for chunk in (1, 3, 8, 10_000_000):
        with pytest.raises(DataError) as caught:
            content = text if isinstance(text, bytes) else text.encode()
            list(index.scan(Path("some.json"), io.BytesIO(content), chunk))
        assert str(caught.value).startswith("some.json: ") and says in str(caught.value), caught.value
        assert len(str(caught.value).splitlines()) == 1


def test_a_scan_holds_little_in_memory():
    text = json.dumps(["x" * 1000] * 2000).encode()
    reader = index.Reader(io.BytesIO(text), 10_000)
    longest = 0
    for _ in range(2000):
        assert reader.peek() in "[,"
        reader.skip(reader.at + 1)
        reader.peek()
        reader.skip(reader.value()[2])
        longest = max(longest, len(reader.text))
    assert longest < 25_000


def test_kept_index_equals_the_one_in_memory(tmp_path, kept, monkeypatch):
    path = write(tmp_path / "a.json", [*seen("a.png", 3), 7, *told(2), record("x", "y", ["a.png", "b.png"])])
    first, again = RecordFile(path), RecordFile(path)
    assert len(list(kept.glob("*-*"))) == 1 and isinstance(first.spans, np.memmap)
    monkeypatch.setattr(index, "MIN_KEPT", 1_000_000)
    memory = RecordFile(path)
    assert memory.folder is None
    for file in (first, again):
        assert file.distinct_images == memory.distinct_images == 1
        assert list(file) == list(memory) == json.loads(path.read_text())
        assert file.faults == memory.faults and set(file.faults) == {3, 6}
        for name in ("spans", "rounds", "image_counts"):
            assert np.array_equal(getattr(file, name), getattr(memory, name)), name
    assert memory.image_counts.tolist() == [1, 1, 1, 0, 0, 0, 0] and memory.rounds.tolist() == [1, 1, 1, 0, 1, 1, 0]


def test_an_index_is_built_once(tmp_path, kept, monkeypatch):
    path = write(tmp_path / "a.json", told(3))
    RecordFile(path)
    monkeypatch.setattr(index, "build_index", lambda *_: pytest.fail("built again"))
    assert len(RecordFile(path)) == 3
    assert len(RecordFile(tmp_path / "." / "a.json")) == 3


def test_a_file_that_changes_gets_a_new_index_and_the_old_one_goes(tmp_path, kept):
    path = write(tmp_path / "a.json", told(3))
    old = RecordFile(path)
    write(tmp_path / "b.json", told(1))
    RecordFile(tmp_path / "b.json")
    write(path, told(4))
    assert len(RecordFile(path)) == 4 and len(list(kept.glob("*-*"))) == 2
    with pytest.raises(DataError, match="changed"):  # not half of one and half of the other
        old[0]


def build(path, root, go, results):
    """In a process of its own, as soon as all are ready."""
    index.MIN_KEPT, files.OUTPUT_ROOT, built = 0, root, index.build_index

    def counted(*args):
        results.put("built")
        return built(*args)

    index.build_index = counted
    go.wait()
    results.put(len(RecordFile(path)))


def test_of_processes_that_come_at_once_one_builds_and_all_read(tmp_path):
    path, context = write(tmp_path / "a.json", told(2000)), multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Barrier(4)
    crowd = [context.Process(target=build, args=(path, tmp_path / "out", go, results)) for _ in range(4)]
    for process in crowd:
        process.start()
    found = [results.get(timeout=60) for _ in range(5)]
    for process in crowd:
        process.join(60)
    assert sorted(map(str, found)) == ["2000"] * 4 + ["built"]
    assert not list((tmp_path / "out/index").glob("*.partial"))


def test_a_file_that_is_no_json_leaves_nothing_half_done(tmp_path, kept):
    (tmp_path / "a.json").write_text(json.dumps(told(3))[:-1])
    for _ in range(2):
        with pytest.raises(DataError, match="record 3"):
            RecordFile(tmp_path / "a.json")
    assert [path.suffix for path in kept.iterdir()] == [".lock"]


def test_a_build_that_was_killed_is_no_index(tmp_path, kept, monkeypatch):
    path = write(tmp_path / "a.json", told(3))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: exit("killed"))
        with pytest.raises(SystemExit):
            RecordFile(path)
    assert len(RecordFile(path)) == 3 and not list(kept.glob("*.partial"))


@pytest.mark.parametrize("small", [0, 1_000_000])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_this_process_reads(tmp_path, kept, monkeypatch, small, context):
    monkeypatch.setattr(index, "MIN_KEPT", small)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write(tmp_path / "a.json", seen("a.png", 9) + told(9))
    dataset = Records([Source(read_records(path), tmp_path)], TOKENIZER, CONFIG, 500)
    loader = DataLoader(
        dataset, batch_sampler=[[i] for i in range(18)], num_workers=2, multiprocessing_context=context,
        collate_fn=list,
    )  # fmt: skip
    assert [sample["ids"] for (sample,) in loader] == [dataset[i]["ids"] for i in range(18)]


def test_an_index_travels_as_a_path(tmp_path, kept):
    file = RecordFile(write(tmp_path / "a.json", told(20_000)))
    parcel = pickle.dumps(file)
    assert len(parcel) < 2_000 and list(pickle.loads(parcel)) == list(file)


def tokenizers():
    folder = Path(__file__).parents[2] / "../shared/data/tokenizers"
    return [TOKENIZER] + [Tokenizer.load(folder / name) for name in ("llama2", "clip", "gpt2") if folder.exists()]


def test_tokenizers_travel():
    prints = set()
    for tokenizer in tokenizers():
        text = "a cat on a mat, naïvely 👩‍👧"
        other = pickle.loads(pickle.dumps(tokenizer))
        assert other.encode(text) == tokenizer.encode(text) and other.fingerprint() == tokenizer.fingerprint()
        other.add_special("<more>")
        assert other.fingerprint() != tokenizer.fingerprint()
        prints |= {tokenizer.fingerprint()}
    assert len(prints) == len(tokenizers())


# ---------------------------------------------------------------------------------------------------------------------
# lengths


def test_lengths_are_those_of_the_samples(tmp_path, kept):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    content = seen("a.png", 9) + told(9) + [record("<image><image>", "a", ["a.png", "a.png"])]
    content[3]["conversations"] += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "no " * 200}]
    sources = [
        Source(read_records(write(tmp_path / f"{i}.json", part)), tmp_path) for i, part in enumerate((content, told(4)))
    ]
    for options in ({}, {"questions": 1}, {"text_only": True}, {"template": "plain"}):
        dataset = Records(sources, TOKENIZER, CONFIG, 100, **options)
        for _ in range(2):  # counted, and found again
            lengths = dataset.lengths()
            assert np.abs(lengths).tolist() == [len(dataset[i]["ids"]) for i in range(len(dataset))]
            assert (lengths > 0).tolist() == [bool(dataset[i]["pixel_values"]) for i in range(len(dataset))]
    assert len(list(kept.glob("*/lengths-*.npy"))) == 8


def test_lengths_are_counted_once_for_a_tokenizer(tmp_path, kept, monkeypatch):
    sources = [Source(read_records(write(tmp_path / "a.json", told(9))), tmp_path)]
    lengths = Records(sources, TOKENIZER, CONFIG, 500).lengths()
    with monkeypatch.context() as patch:
        patch.setattr(data, "parallel_map", lambda *_: pytest.fail("counted again"))
        assert np.array_equal(Records(sources, TOKENIZER, CONFIG, 500).lengths(), lengths)
        assert Records(sources, TOKENIZER, CONFIG, 7).lengths().min() == -7
    other = train_bpe(["cat cat cat"] * 5, 3)
    assert not np.array_equal(Records(sources, other, CONFIG, 500).lengths(), lengths)


def test_counting_draws_no_random_numbers(tmp_path):
    """Or a start that finds the lengths kept would go on with other numbers than the one that counted them."""
    sources = [Source(read_records(write(tmp_path / "a.json", told(9))), tmp_path)]
    before = torch.get_rng_state()
    Records(sources, TOKENIZER, CONFIG, 500).lengths()
    assert torch.equal(torch.get_rng_state(), before)


def test_lengths_counted_by_many_processes_are_the_same(tmp_path, monkeypatch):
    sources = [Source(read_records(write(tmp_path / "a.json", told(600))), tmp_path)]
    dataset = Records(sources, TOKENIZER, CONFIG, 500)
    alone = dataset.lengths()
    monkeypatch.setattr(parallel, "MIN_PARALLEL", 10)
    assert np.array_equal(dataset.lengths(), alone)


@pytest.mark.parametrize("size, turned", [((8, 4), False), ((4, 8), False), ((8, 4), True), ((3, 3), False)])
def test_images_in_tiles_are_counted_from_their_headers(tmp_path, size, turned):
    config = LlavaConfig(
        TextConfig(), CONFIG.vision_config, template="llava_hf", image_grid_pinpoints=[[4, 8], [8, 4], [8, 8]]
    )
    image, exif = Image.new("RGB", size), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image.save(tmp_path / "a.jpg", exif=exif)
    dataset = Records(
        [Source(read_records(write(tmp_path / "a.json", seen("a.jpg"))), tmp_path)], TOKENIZER, config, 500
    )
    assert dataset.lengths().tolist() == [len(dataset[0]["ids"])]
    (tmp_path / "a.jpg").unlink()
    assert dataset.lengths()[0] > 0  # as much as the largest: who draws it will say that it is gone


# ---------------------------------------------------------------------------------------------------------------------
# mixtures


def test_a_name_and_its_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b:2", "c:d.json"):
        Path(name).touch()
    assert split_weight("a.json") == (Path("a.json"), 1) and split_weight("a.json:2.5") == (Path("a.json"), 2.5)
    assert split_weight("b:2") == (Path("b:2"), 1) and split_weight("b:2:3") == (Path("b:2"), 3)
    assert split_weight("c:d.json") == (Path("c:d.json"), 1) and split_weight("none.json") == (Path("none.json"), 1)
    for text in ("a.json:two", "a.json:", "a.json:0", "a.json:-1", "a.json:nan", "a.json:inf", r"C:\data\a.json"):
        with pytest.raises(ValueError, match="is no weight"):
            split_weight(text)


def count(take, total, sizes):
    """How often each sample comes, by source."""
    times = np.bincount(take(0, total), minlength=sum(sizes))
    return np.split(times, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sizes", [[1], [7], [3, 9], [100, 1, 40]])
def test_plain_files_are_one_file_and_epochs_are_exact(sizes):
    total, ones = sum(sizes), [1.0] * len(sizes)
    take, one = epochs(sizes, ones, 5), epochs([total], [1.0], 5)
    assert np.array_equal(take(0, 4 * total), one(0, 4 * total))
    for epoch in range(4):
        assert sorted(take(epoch * total, (epoch + 1) * total)) == list(range(total))


def test_weights_are_times_an_epoch():
    sizes, weights = [10, 8, 20], [2.0, 1.0, 0.25]
    take = epochs(sizes, weights, 0)
    length = 20 + 8 + 5
    for epoch in range(4):
        twice, once, rarely = count(lambda a, b, first=epoch * length: take(first + a, first + b), length, sizes)
        assert set(twice) == {2} and set(once) == {1} and sorted(rarely) == [0] * 15 + [1] * 5
    assert set(count(take, 4 * length, sizes)[2]) == {1}  # another quarter each time
    more = epochs([10], [2.5], 0)
    assert sorted(np.bincount(more(0, 25))) == [2] * 5 + [3] * 5 and set(np.bincount(more(0, 50))) == {5}
    assert len(epochs([10], [0.001], 0)(0, 5)) == 5


@pytest.mark.parametrize("mixing, expected", [
    ("equal", [1 / 3, 2 / 3]), ("2", [1 / 7, 6 / 7]), ("1", [1 / 19, 18 / 19]), ("0.5", [1 / 163, 162 / 163]),
])  # fmt: skip
def test_shares_by_temperature_times_weights(mixing, expected):
    sizes, total = [100, 900], 20_000
    take = order_of(sizes, [1.0, 2.0], 0, total, mixing, "", 1)
    few, many = (part.sum() / total for part in count(take, total, sizes))
    assert (few, many) == pytest.approx(expected, abs=1e-3)


def test_in_shares_nothing_comes_again_before_all_has_come():
    sizes, total = [7, 50, 400], 1200
    for part in count(order_of(sizes, [1.0] * 3, 0, total, "equal", "", 1), total, sizes):
        assert part.max() - part.min() <= 1
    take = order_of(sizes, [1.0] * 3, 0, total, "equal", "", 1)
    of_first = [i for i in take(0, total) if i < 7]
    rounds = [tuple(of_first[i : i + 7]) for i in range(0, len(of_first) - 7, 7)]
    assert all(sorted(part) == list(range(7)) for part in rounds) and len(set(rounds)) > 10


def test_every_batch_has_its_shares():
    sizes, total = [100, 900, 50], 16 * 400
    take = evenly(sizes, np.array([[0.5, 0.3, 0.2]]), 0, total)
    for first in range(0, total, 16):
        parts = [part.sum() for part in count(lambda a, b, f=first: take(f, f + b), 16, sizes)]
        assert np.abs(np.array(parts) - [8, 4.8, 3.2]).max() < 3.5


def test_shares_move_in_equal_steps_from_the_first_to_the_last():
    assert read_shares("80/20").tolist() == [[0.8, 0.2]]
    assert read_shares("80/20:20/80:4") == pytest.approx(np.array([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]]))
    sizes, total = [300, 5000], 10_000
    take = order_of(sizes, [1.0, 1.0], 3, total, "proportional", "80/20:20/80:4", 1)
    found = [np.mean(take(first, first + 2500) < 300) for first in range(0, total, 2500)]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=2e-3)
    take = order_of(sizes, [1.0, 1.0], 3, total, "proportional", "1/0:0/1:2", 1)
    assert take(0, 5000).max() < 300 <= take(5000, total).min()


@pytest.mark.parametrize("text", [
    "", "80", "80/x", "80/20:20/80", "80/20:20/80:1", "80/20:20/80:2.5", "80/20:20/80:x", "80/20:1/2/3:4", "0/0",
    "-1/2", "80/20:0/0:4", "80/20:20/80:4:5", "inf/1", "nan/1",
])  # fmt: skip
def test_shares_that_are_none(text):
    if text == "80":
        assert read_shares(text).tolist() == [[1.0]]
        return
    with pytest.raises(ValueError, match="write 80/20"):
        read_shares(text)


ORDERS = {
    "weights": lambda sizes, total: order_of(sizes, [1.0, 2.0], 1, total, "proportional", "", 1),
    "equal": lambda sizes, total: order_of(sizes, [1.0, 1.0], 1, total, "equal", "", 1),
    "moving": lambda sizes, total: order_of(sizes, [1.0, 1.0], 1, total, "proportional", "9/1:1/9:3", 1),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_same_batches_on_any_number_of_ranks_and_after_any_stop(kind, grouped):
    sizes, size, stop = [30, 90], 8, 3 * GROUPED_STEPS + 5
    lengths = np.random.default_rng(0).integers(-50, 50, 120) if grouped else None

    def run(world, start=0):
        take = ORDERS[kind](sizes, size * stop)
        ranks = [list(batches(take, size, 1, start, stop, rank, world, 1, lengths)) for rank in range(world)]
        return [list(step) for step in zip(*ranks, strict=True)]

    whole = run(1)
    assert len(whole) == stop and all(len(step[0]) == size for step in whole)
    for world in (2, 4, 8):
        assert [sorted(chain(*step)) for step in run(world)] == [sorted(step[0]) for step in whole]
    for start in (1, 15, 16, 40, stop - 1):
        assert run(2, start) == run(2)[start:]
    drawn = np.concatenate([step[0] for step in whole])
    assert sorted(drawn) == sorted(ORDERS[kind](sizes, size * stop)(0, size * stop))  # the end of the run included


def test_images_and_text_share_one_batch_in_a_block_at_most():
    rng, size = np.random.default_rng(0), 16
    lengths = rng.integers(600, 900, 2000) * np.where(np.arange(2000) % 7 < 2, -1, 1)
    steps = list(batches(epochs([2000], [1.0], 0), size, 0, 0, 125, 0, 1, 1, lengths))
    assert sorted(chain(*steps)) == list(range(2000))  # 125 steps are one epoch, though not a whole number of blocks
    mixed = [len({int(lengths[i] > 0) for i in step}) == 2 for step in steps]
    blocks = [sum(mixed[i : i + GROUPED_STEPS]) for i in range(0, 125, GROUPED_STEPS)]
    assert max(blocks) == 1 and sum(mixed) > 0
    assert len({int(lengths[steps[i][0]] > 0) for i in range(GROUPED_STEPS)}) == 2
    padding = [max(abs(lengths[i]) for i in step) - np.mean([abs(lengths[i]) for i in step]) for step in steps]
    assert np.mean(padding) < 40


def test_samples_of_many_files_come_from_the_right_one(tmp_path):
    for folder, color in (("one", 10), ("two", 200)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), (color, 0, 0)).save(tmp_path / folder / "a.png")
    paths = [
        write(tmp_path / "one/a.json", seen("a.png", 3)),
        write(tmp_path / "two/b.json", told(2) + seen("a.png", 2)),
    ]
    for folders in (None, [tmp_path / "one", tmp_path / "two"]):
        dataset = Records(open_sources([str(path) for path in paths], folders), TOKENIZER, CONFIG, 500)
        assert dataset.sizes == [3, 4] and [dataset.where(i)[len(str(tmp_path)) :] for i in (2, 3, 6)] == [
            "/one/a.json: record 2 (id 2)", "/two/b.json: record 0 (id 0)", "/two/b.json: record 3 (id 1)",
        ]  # fmt: skip
        reds = [float(pixels[0].mean()) for i in (0, 6) for pixels in dataset[i]["pixel_values"]]
        assert reds[0] < reds[1] and len(dataset.images()) == 2
    shared = Records(open_sources([str(path) for path in paths], [tmp_path / "one"]), TOKENIZER, CONFIG, 500)
    assert len(shared.images()) == 1


def test_clip_passes_over_files_without_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    sources = [
        Source(read_records(write(tmp_path / f"{i}.json", part)), tmp_path)
        for i, part in enumerate((told(3), seen("a.png", 2)))
    ]
    config = CLIPConfig(CONFIG.vision_config, CLIPTextConfig(max_position_embeddings=6))
    pairs = data.CaptionPairs(sources, TOKENIZER, config, "pad")
    assert pairs.sizes == [2] and pairs.sources == sources[1:] and len(pairs[1]["pixel_values"]) == 1


def test_clip_keeps_neighbors_together_and_so_takes_no_shares():
    take = order_of([8, 8], [1.0, 2.0], 0, 48, "proportional", "", 4)
    for first in range(0, 48, 4):
        part = take(first, first + 4)
        assert part.tolist() == list(range(part[0], part[0] + 4))
    with pytest.raises(ValueError, match="neighbors"):
        order_of([8, 8], [1.0, 1.0], 0, 48, "equal", "", 4)


# ---------------------------------------------------------------------------------------------------------------------
# bad data


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A good file, one with faults of five kinds in 20 records, and a folder of images of which one is broken."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (72, 72)).save(images / "a.png")
    (images / "broken.png").write_bytes(b"<html>")
    good = write(tmp_path / "good.json", seen("a.png", 8) + told(12))
    content = seen("a.png", 8) + told(12)
    content[1] = record("What?", "a", "a.png", "one")  # no marker
    content[4] = record("<image>", "a", "gone.png", "four")
    content[5] = record("<image>", "a", "../a.png", "five")
    content[6] = record("<image>", "a", "broken.png", "six")
    text = json.dumps(content)
    text = text.replace(json.dumps(content[9]), '{"id": NaN}')
    (tmp_path / "bad.json").write_text(text)
    write(tmp_path / "unmarked.json", [record("What?", "a", "a.png", i) for i in range(2)] + seen("a.png", 2))
    return SimpleNamespace(good=good, bad=tmp_path / "bad.json", images=images, folder=tmp_path)


def status(command, *argv):
    with pytest.raises(SystemExit) as caught:
        command(data, *argv)
    return caught.value.code


def test_check_counts_by_kind_and_says_so_by_its_status(mine, command, capsys):
    assert status(command, "check", mine.good, "--images", mine.images) == 0
    assert "all 20 records are good" in capsys.readouterr().out
    assert status(command, "check", f"{mine.good}:2", mine.bad, "--images", mine.images) == 1
    said = capsys.readouterr().out
    assert "4 of 40 records are bad" in said and "weight 2; 0 bad" in said
    for kind in (
        "… <image> markers for … images",
        "image: no such file",
        "… leaves the images folder",
        "not JSON (NaN",
    ):
        assert f"1  {kind}" in said, said
    assert "record 4 (id 'four')" in said and "gone.png" in said and "record 9 (id nan)" in said
    assert status(command, "check", mine.bad, "--images", mine.images, "--decode") == 1
    said = capsys.readouterr().out
    assert "5 of 20 records are bad" in said and "record 6 (id 'six')" in said and "not an image" in said
    assert status(command, "check", mine.folder / "unmarked.json", "--images", mine.images) == 1
    assert "        2  … <image> markers for … images" in capsys.readouterr().out


def test_check_shows_the_lengths_with_the_images_in_them(mine, tiny, command, capsys):
    assert status(command, "check", mine.good, "--images", mine.images, "--model", tiny.stage1) == 0
    lines = capsys.readouterr().out.splitlines()
    bars = [line for line in lines if " - " in line]
    assert any("tokens: " in line for line in lines) and sum(int(bar.split()[3].replace(",", "")) for bar in bars) == 20
    dataset = Records(
        open_sources([str(mine.good)], [mine.images]),
        Tokenizer.load(tiny.stage1),
        load_model(tiny.stage1).config,
        999,
    )
    assert f"tokens: {np.abs(dataset.lengths()).sum():,} in all" in "\n".join(lines)


def test_show_prints_a_record(mine, tiny, command, capsys):
    command(data, "show", mine.good, "--model", tiny.stage1, "--record", 1)
    assert "\033[32m" in capsys.readouterr().out


BAD_FLAGS = {
    "weight": (["--data", "good.json:two"], "'two' is no weight"),
    "weight 0": (["--data", "good.json", "good.json:0"], "good.json:0"),
    "no JSON": (["--data", "good.json", "noise.json"], "noise.json: not JSON"),
    "no file": (["--data", "none.json"], "none.json: No such file"),
    "no images": (["--data", "good.json", "--images", "nowhere"], "--images nowhere: no such folder"),
    "two folders for three files": (
        ["--data", *["good.json"] * 3, "--images", "images", "images"],
        "--images names 2",
    ),
    "shares of three": (["--data", "good.json", "good.json", "--shares", "1/1/1"], "--shares 1/1/1 is for 3 files"),
    "shares and weights": (["--data", "good.json:2", "good.json", "--shares", "1/1"], "leave the weights"),
    "shares and mixing": (
        ["--data", "good.json", "good.json", "--shares", "1/1", "--mixing", "equal"],
        "leave the weights",
    ),
    "a bad record": (["--data", "bad.json"], "bad.json: record 1 (id 'one'): 0 <image> markers"),
    "too many": (["--data", "bad.json", "--skip-bad", "15%"], "4 of 20 records are bad, over the 15 % of --skip-bad"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
@pytest.mark.parametrize("stage", ["stage2", "clip", "decoder"])
def test_bad_input_ends_in_one_line_before_any_work(kind, stage, mine, tiny, command, monkeypatch):
    argv, says = BAD_FLAGS[kind]
    if stage == "clip" and kind.startswith("shares"):
        says = "neighbors"
    (mine.folder / "noise.json").write_text("<html>")
    monkeypatch.setattr(train, "load_checkpoint", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr(train, "new_decoder", lambda *_: pytest.fail("the model is made"))
    monkeypatch.setattr(train, "train_bpe", lambda *_, **__: pytest.fail("the vocabulary is learned"))
    argv = ["--images", mine.images, *argv] if "--images" not in argv else argv
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags[stage], *argv, "--out", "run")
    assert caught.value.code.startswith("train.py: ") and says in caught.value.code
    assert len(caught.value.code.splitlines()) == 1
    assert not (mine.folder / "run").exists() and not (mine.folder / "out").exists()


@pytest.mark.parametrize("argv, says", [
    (["--mixing", "warm"], "--mixing warm"), (["--mixing", "0"], "--mixing 0"), (["--shares", "80"], None),
    (["--shares", "80/20:1"], "--shares 80/20:1"), (["--skip-bad", "many"], "no percentage"),
    (["--skip-bad", "101"], "101"),
])  # fmt: skip
def test_flags_that_are_none(argv, says, command, capsys):
    if says is None:
        assert train.read_flags("", ["--stage", "2", *argv]).shares == "80"
        return
    with pytest.raises(SystemExit) as caught:
        train.read_flags("", ["--stage", "2", *argv])
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_more_ranks_than_records(mine, tiny, command):
    args = train.read_flags(
        "", ["--stage", "2", "--data", str(mine.good), "--images", str(mine.images), "--batch-size", "8"]
    )
    ranks = SimpleNamespace(world_size=32, is_main=True, broadcast=lambda value: value)
    with pytest.raises(ValueError, match="20 records for 32 ranks"):
        train.data_files(args, ranks, "instruct")
    with pytest.raises(ValueError, match="--batch-size 8 is not a multiple of 32 ranks"):
        train.micro_batch(args, ranks)


def dataset_of(mine, percent, path):
    sources = open_sources([str(mine.bad)], [str(mine.images)])
    for source in sources:
        source.faults |= check.image_faults(source)
    dataset = Records(sources, TOKENIZER, CONFIG, 500)
    dataset.skips = check.Skips(percent, len(dataset), path)
    return dataset


def test_in_the_place_of_a_broken_image_comes_the_next_good_sample(mine):
    path = mine.folder / "run/skipped.jsonl"
    dataset = dataset_of(mine, 10, path)
    assert dataset.numbers.tolist() == [0, 2, 3, 6, 7, 8, *range(10, 20)]
    assert dataset[3]["ids"] == dataset[4]["ids"] and dataset[3]["ids"] == dataset[3]["ids"]
    (line,) = path.read_text().splitlines()
    assert "record 6 (id 'six')" in line and "not an image" in json.loads(line)["reason"]
    assert dataset_of(mine, 10, path)[3]["ids"] == dataset[4]["ids"]  # whoever asks, after a resume too
    assert len(path.read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"record 6.*over the 5 % of --skip-bad"):
        dataset_of(mine, 5, path)[3]
    dataset.skips = None
    with pytest.raises(DataError, match="record 6"):
        dataset[3]


def test_workers_share_what_they_know_of_bad_samples(mine):
    dataset = dataset_of(mine, 100, mine.folder / "run/skipped.jsonl")
    order = [[i] for i in range(16)] * 2
    loader = DataLoader(dataset, batch_sampler=order, num_workers=2, collate_fn=lambda part: collate(part, 0))
    assert len(list(loader)) == 32
    assert dataset.skips.state.tolist() == [1, 1, 1, 3] + [1] * 12


def test_an_error_in_a_worker_is_one_line(mine):
    (source,) = open_sources([str(mine.bad)], [str(mine.images)])
    dataset = Records([source], TOKENIZER, CONFIG, 500)
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, batch_sampler=[[3]], num_workers=1, collate_fn=list))
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith(
        f"{mine.bad}: record 4 (id 'four'): "
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache", [4, 0])
def test_bad_records_are_left_out_and_named(mine, tiny, command, capsys, cache):
    argv = [*tiny.flags["stage2"], "--data", mine.bad, mine.good, "--images", mine.images, "--skip-bad", "20%"]
    command(train, *argv, "--cache-gb", cache, "--out", "run")
    assert "4 records are left out" in capsys.readouterr().err
    named = [json.loads(line)["record"] for line in Path("run/skipped.jsonl").read_text().splitlines()]
    assert [name.split("record ")[1].split(" ")[0].rstrip(":") for name in named] == ["1", "9", "4", "5", "6"]
    assert len(rows(Path("run"))) == 6


def test_a_mixture_trains_and_resumes_bit_by_bit(mine, tiny, command, monkeypatch):
    argv = [*tiny.flags["stage2"], "--data", mine.bad, mine.good, "--images", mine.images, "--skip-bad", "20"]
    argv += ["--shares", "80/20:20/80:2", "--workers", 2]
    command(train, *argv, "--out", "whole")
    step = train.train_step

    def interrupted(*args):
        if args[-1] == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(SystemExit):
            command(train, *argv, "--out", "parts")
    command(train, *argv, "--out", "parts", "--resume")
    assert Path("whole/model.safetensors").read_bytes() == Path("parts/model.safetensors").read_bytes()
    assert Counter(Path("parts/skipped.jsonl").read_text().splitlines()).most_common(1)[0][1] == 1


def test_the_order_of_train_is_that_of_the_mixture(mine, tiny, command, monkeypatch):
    """What make_loader hands out, step by step: every sample of the epoch, the second file's twice."""
    asked = []
    monkeypatch.setattr(
        train, "fit", lambda args, ranks, run, model, dataset, *rest, **more: asked.append((args, dataset))
    )
    argv = [*tiny.flags["stage2"], "--data", mine.good, f"{mine.good}:2", "--images", mine.images]
    command(train, *argv, "--steps", 15, "--batch-size", 4, "--out", "run")
    ((args, dataset),) = asked
    loader = train.make_loader(dataset, args, train.Distributed("cpu"), 0, 0, 1)
    assert sorted(chain(*loader.batch_sampler)) == sorted([*range(20), *range(20, 40), *range(20, 40)])
