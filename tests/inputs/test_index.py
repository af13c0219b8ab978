"""Large JSON files: the index gives exactly the records of the file, is built once, and keeps the lengths."""

import json
import multiprocessing
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CONFIG, TOKENIZER, record, with_image, without_image, write_json
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import Records
from inputs import files, index, parallel
from inputs.index import RecordFile, read_records
from inputs.mixture import (
    Source,
)
from inputs.records import DataError
from inputs.tokenizer import Tokenizer, train_bpe
from llava import LlavaConfig, TextConfig


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep the index of every file, however small."""
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
def test_a_scan_equals_json_loads(indent, ascii_only, mark):
    text = mark + json.dumps(HOSTILE, ensure_ascii=ascii_only, indent=indent).encode() + b" \r\n\t"
    found = list(index.scan(Path("x"), text))
    assert [value for value, _, _ in found] == HOSTILE and not any(fault for _, fault, _ in found)
    assert [json.loads(text[start : start + size]) for _, _, (start, size) in found] == HOSTILE


def test_a_bad_value_does_not_spoil_the_file():
    spoiled = ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1, "a": "]}"}', "9" * 5000, "NaN"]
    text = "[" + ", ".join(f'{{"n": {i}}}, {bad}' for i, bad in enumerate(spoiled)) + ', "last"]'
    found = list(index.scan(Path("x"), text.encode()))
    assert [value for value, fault, _ in found if not fault] == [*({"n": i} for i in range(5)), "last"]
    faults = [fault for _, fault, _ in found if fault]
    assert [word in fault for word, fault in zip(("NaN", "Infinity", "duplicate key", "digits", "NaN"), faults)] == [
        True
    ] * 5


@pytest.mark.parametrize("text, says", [
    ("[1, 2,]", "record 2"), ("[1 2]", "record 0"), ("[1, 2] 3", "Extra"), ('[1, "2]', "record 1"),
    ("[tru]", "record 0"), ('[{"a" 1}]', "record 0"), ("[1, 2", "record 2"), ('{"a": 1}\n{"a": 2}\n', "JSON Lines"),
    ("[{]}, 1]", "record 0"), ("[NaN, [NaN 1]]", "record 1"), ("[1, 2}", "record 1"),
    ("", "not JSON"),
    ("[" + "[" * 100_000, "deep"), ("[]", "at least one"), ("{}", "list"), ("[\x01]", "not JSON"),
    ('["\\x"]', "not JSON"), (b'["ok", "\xc3"]', "UTF-8"), (b'["ok", "\xc3', "UTF-8"),
    (b"\xff\xfe[\x00]\x00", "UTF-8"),
])  # fmt: skip
def test_anything_but_a_list_is_refused(text, says):
    with pytest.raises(DataError) as caught:
        list(index.scan(Path("some.json"), text if isinstance(text, bytes) else text.encode()))
    assert str(caught.value).startswith("some.json: ") and says in str(caught.value), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_a_scan_holds_one_record_in_memory():
    text = json.dumps(["x" * 1000] * 2000).encode()
    tracemalloc.start()
    assert sum(1 for _ in index.scan(Path("x"), text)) == 2000
    assert tracemalloc.get_traced_memory()[1] < 25_000
    tracemalloc.stop()


def test_kept_index_equals_the_one_in_memory(tmp_path, kept, monkeypatch):
    path = write_json(
        tmp_path / "a.json", [*with_image("a.png", 3), 7, *without_image(2), record("x", "y", ["a.png", "b.png"])]
    )
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
    path = write_json(tmp_path / "a.json", without_image(3))
    RecordFile(path)
    monkeypatch.setattr(index, "build_index", lambda *_: pytest.fail("built again"))
    assert len(RecordFile(path)) == 3
    assert len(RecordFile(tmp_path / "." / "a.json")) == 3


def test_a_file_that_changes_gets_a_new_index_and_the_old_one_goes(tmp_path, kept):
    path = write_json(tmp_path / "a.json", without_image(3))
    old = RecordFile(path)
    write_json(tmp_path / "b.json", without_image(1))
    RecordFile(tmp_path / "b.json")
    write_json(path, without_image(4))
    assert len(RecordFile(path)) == 4 and len(list(kept.glob("*-*"))) == 2
    with pytest.raises(DataError, match="changed"):  # records of the old and the new file never mix
        old[0]


def build(path, root, go, results):
    """Open the file as soon as all processes are ready; for a new process."""
    index.MIN_KEPT, files.OUTPUT_ROOT, built = 0, root, index.build_index

    def counted(*args):
        results.put("built")
        return built(*args)

    index.build_index = counted
    go.wait()
    results.put(len(RecordFile(path)))


def test_of_several_processes_one_builds_the_index_and_all_read_it(tmp_path):
    path, context = write_json(tmp_path / "a.json", without_image(2000)), multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Barrier(4)
    crowd = [context.Process(target=build, args=(path, tmp_path / "out", go, results)) for _ in range(4)]
    for process in crowd:
        process.start()
    found = [results.get(timeout=60) for _ in range(5)]
    for process in crowd:
        process.join(60)
    assert sorted(map(str, found)) == ["2000"] * 4 + ["built"]
    assert not list((tmp_path / "out/index").glob("*.partial"))


def test_a_file_that_is_not_json_leaves_no_partial_index(tmp_path, kept):
    (tmp_path / "a.json").write_text(json.dumps(without_image(3))[:-1])
    for _ in range(2):
        with pytest.raises(DataError, match="record 3"):
            RecordFile(tmp_path / "a.json")
    assert [path.suffix for path in kept.iterdir()] == [".lock"]


def test_a_killed_build_leaves_no_index(tmp_path, kept, monkeypatch):
    path = write_json(tmp_path / "a.json", without_image(3))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: exit("killed"))
        with pytest.raises(SystemExit):
            RecordFile(path)
    assert len(RecordFile(path)) == 3 and not list(kept.glob("*.partial"))


@pytest.mark.parametrize("small", [0, 1_000_000])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_the_same_records(tmp_path, kept, monkeypatch, small, context):
    monkeypatch.setattr(index, "MIN_KEPT", small)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write_json(tmp_path / "a.json", with_image("a.png", 9) + without_image(9))
    dataset = Records([Source(read_records(path), tmp_path)], TOKENIZER, CONFIG, 500)
    loader = DataLoader(
        dataset, batch_sampler=[[i] for i in range(18)], num_workers=2, multiprocessing_context=context,
        collate_fn=list,
    )  # fmt: skip
    assert [sample["ids"] for (sample,) in loader] == [dataset[i]["ids"] for i in range(18)]


def test_a_pickled_index_holds_its_path_not_its_arrays(tmp_path, kept):
    file = RecordFile(write_json(tmp_path / "a.json", without_image(20_000)))
    parcel = pickle.dumps(file)
    assert len(parcel) < 2_000 and list(pickle.loads(parcel)) == list(file)


def tokenizers():
    folder = Path(__file__).parents[2] / "../shared/data/tokenizers"
    return [TOKENIZER] + [Tokenizer.load(folder / name) for name in ("llama2", "clip", "gpt2") if folder.exists()]


def test_a_pickled_tokenizer_is_the_same():
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


def test_lengths_equal_those_of_the_samples(tmp_path, kept):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    content = with_image("a.png", 9) + without_image(9) + [record("<image><image>", "a", ["a.png", "a.png"])]
    content[3]["conversations"] += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "no " * 200}]
    sources = [
        Source(read_records(write_json(tmp_path / f"{i}.json", part)), tmp_path)
        for i, part in enumerate((content, without_image(4)))
    ]
    for options in ({}, {"questions": 1}, {"text_only": True}, {"template": "plain"}):
        dataset = Records(sources, TOKENIZER, CONFIG, 100, **options)
        for _ in range(2):  # counted, then read from the cache
            lengths = dataset.lengths()
            assert np.abs(lengths).tolist() == [len(dataset[i]["ids"]) for i in range(len(dataset))]
            assert (lengths > 0).tolist() == [bool(dataset[i]["pixel_values"]) for i in range(len(dataset))]
    assert len(list(kept.glob("*/lengths-*.npy"))) == 8


def test_lengths_are_counted_once_per_tokenizer(tmp_path, kept, monkeypatch):
    sources = [Source(read_records(write_json(tmp_path / "a.json", without_image(9))), tmp_path)]
    lengths = Records(sources, TOKENIZER, CONFIG, 500).lengths()
    with monkeypatch.context() as patch:
        patch.setattr(data, "parallel_map", lambda *_: pytest.fail("counted again"))
        assert np.array_equal(Records(sources, TOKENIZER, CONFIG, 500).lengths(), lengths)
        assert Records(sources, TOKENIZER, CONFIG, 7).lengths().min() == -7
    other = train_bpe(["cat cat cat"] * 5, 3)
    assert not np.array_equal(Records(sources, other, CONFIG, 500).lengths(), lengths)


def test_counting_draws_no_random_numbers(tmp_path):
    """Otherwise a run that counts lengths would differ from a run that finds them cached."""
    sources = [Source(read_records(write_json(tmp_path / "a.json", without_image(9))), tmp_path)]
    before = torch.get_rng_state()
    Records(sources, TOKENIZER, CONFIG, 500).lengths()
    assert torch.equal(torch.get_rng_state(), before)


def test_lengths_counted_by_several_processes_are_the_same(tmp_path, monkeypatch):
    sources = [Source(read_records(write_json(tmp_path / "a.json", without_image(600))), tmp_path)]
    dataset = Records(sources, TOKENIZER, CONFIG, 500)
    alone = dataset.lengths()
    monkeypatch.setattr(parallel, "MIN_PARALLEL", 10)
    assert np.array_equal(dataset.lengths(), alone)


@pytest.mark.parametrize("size, turned", [((8, 4), False), ((4, 8), False), ((8, 4), True), ((3, 3), False)])
def test_tokens_of_tiles_are_counted_from_image_headers(tmp_path, size, turned):
    config = LlavaConfig(
        TextConfig(), CONFIG.vision_config, template="llava_hf", image_grid_pinpoints=[[4, 8], [8, 4], [8, 8]]
    )
    image, exif = Image.new("RGB", size), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image.save(tmp_path / "a.jpg", exif=exif)
    dataset = Records(
        [Source(read_records(write_json(tmp_path / "a.json", with_image("a.jpg"))), tmp_path)], TOKENIZER, config, 500
    )
    assert dataset.lengths().tolist() == [len(dataset[0]["ids"])]
    (tmp_path / "a.jpg").unlink()
    assert dataset.lengths()[0] > 0  # the largest number; loading the sample raises the error
