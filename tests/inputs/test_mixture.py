"""Mixtures: shares and epochs are exact, and the batches of a step do not depend on ranks or on a resume."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data_files import CONFIG, TOKENIZER, with_image, without_image, write_json
from PIL import Image

import data
from clip import CLIPConfig, CLIPTextConfig
from data import Records
from inputs.index import read_records
from inputs.mixture import (
    GROUPED_STEPS,
    Source,
    batches,
    epochs,
    interleave,
    make_order,
    open_sources,
    read_shares,
    split_weight,
)


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
    """Return how often each sample is drawn, one array per source."""
    times = np.bincount(take(0, total), minlength=sum(sizes))
    return np.split(times, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sizes", [[1], [7], [3, 9], [100, 1, 40]])
def test_files_without_weights_equal_one_file_and_epochs_are_exact(sizes):
    total, ones = sum(sizes), [1.0] * len(sizes)
    take, one = epochs(sizes, ones, 5), epochs([total], [1.0], 5)
    assert np.array_equal(take(0, 4 * total), one(0, 4 * total))
    for epoch in range(4):
        assert sorted(take(epoch * total, (epoch + 1) * total)) == list(range(total))


def test_a_weight_is_the_number_of_uses_in_an_epoch():
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
    take = make_order(sizes, [1.0, 2.0], 0, total, mixing, "", 1)
    few, many = (part.sum() / total for part in count(take, total, sizes))
    assert (few, many) == pytest.approx(expected, abs=1e-3)


def test_with_shares_no_sample_is_repeated_before_all_are_drawn():
    sizes, total = [7, 50, 400], 1200
    for part in count(make_order(sizes, [1.0] * 3, 0, total, "equal", "", 1), total, sizes):
        assert part.max() - part.min() <= 1
    take = make_order(sizes, [1.0] * 3, 0, total, "equal", "", 1)
    of_first = [i for i in take(0, total) if i < 7]
    rounds = [tuple(of_first[i : i + 7]) for i in range(0, len(of_first) - 7, 7)]
    assert all(sorted(part) == list(range(7)) for part in rounds) and len(set(rounds)) > 10


def test_every_batch_has_about_its_shares():
    sizes, total = [100, 900, 50], 16 * 400
    take = interleave(sizes, np.array([[0.5, 0.3, 0.2]]), 0, total)
    for first in range(0, total, 16):
        parts = [part.sum() for part in count(lambda a, b, f=first: take(f, f + b), 16, sizes)]
        assert np.abs(np.array(parts) - [8, 4.8, 3.2]).max() < 3.5


def test_shares_move_in_equal_steps_from_the_first_to_the_last():
    assert read_shares("80/20").tolist() == [[0.8, 0.2]]
    assert read_shares("80/20:20/80:4") == pytest.approx(np.array([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]]))
    sizes, total = [300, 5000], 10_000
    take = make_order(sizes, [1.0, 1.0], 3, total, "proportional", "80/20:20/80:4", 1)
    found = [np.mean(take(first, first + 2500) < 300) for first in range(0, total, 2500)]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=2e-3)
    take = make_order(sizes, [1.0, 1.0], 3, total, "proportional", "1/0:0/1:2", 1)
    assert take(0, 5000).max() < 300 <= take(5000, total).min()


@pytest.mark.parametrize("text", [
    "", "80", "80/x", "80/20:20/80", "80/20:20/80:1", "80/20:20/80:2.5", "80/20:20/80:x", "80/20:1/2/3:4", "0/0",
    "-1/2", "80/20:0/0:4", "80/20:20/80:4:5", "inf/1", "nan/1",
])  # fmt: skip
def test_bad_shares_are_refused(text):
    if text == "80":
        assert read_shares(text).tolist() == [[1.0]]
        return
    with pytest.raises(ValueError, match="write 80/20"):
        read_shares(text)


ORDERS = {
    "weights": lambda sizes, total: make_order(sizes, [1.0, 2.0], 1, total, "proportional", "", 1),
    "equal": lambda sizes, total: make_order(sizes, [1.0, 1.0], 1, total, "equal", "", 1),
    "moving": lambda sizes, total: make_order(sizes, [1.0, 1.0], 1, total, "proportional", "9/1:1/9:3", 1),
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


def test_at_most_one_batch_in_a_block_mixes_images_and_text():
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
        write_json(tmp_path / "one/a.json", with_image("a.png", 3)),
        write_json(tmp_path / "two/b.json", without_image(2) + with_image("a.png", 2)),
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


def test_clip_leaves_out_files_without_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    sources = [
        Source(read_records(write_json(tmp_path / f"{i}.json", part)), tmp_path)
        for i, part in enumerate((without_image(3), with_image("a.png", 2)))
    ]
    config = CLIPConfig(CONFIG.vision_config, CLIPTextConfig(max_position_embeddings=6))
    pairs = data.CaptionPairs(sources, TOKENIZER, config, "pad")
    assert pairs.sizes == [2] and pairs.sources == sources[1:] and len(pairs[1]["pixel_values"]) == 1


def test_clip_keeps_neighbors_together_and_refuses_shares():
    take = make_order([8, 8], [1.0, 2.0], 0, 48, "proportional", "", 4)
    for first in range(0, 48, 4):
        part = take(first, first + 4)
        assert part.tolist() == list(range(part[0], part[0] + 4))
    with pytest.raises(ValueError, match="neighbors"):
        make_order([8, 8], [1.0, 1.0], 0, 48, "equal", "", 4)


# ---------------------------------------------------------------------------------------------------------------------
# batches of one file


def run(count, batch_size, seed=0, start=0, stop=30, world=1, group=1, lengths=None):
    """Return steps[s][r], the indices of rank r at step s."""
    take = epochs([count], [1.0], seed, group)
    ranks = [list(batches(take, batch_size, seed, start, stop, rank, world, group, lengths)) for rank in range(world)]
    return [list(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 16, 33])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 40])
def test_every_record_once_an_epoch(count, batch_size):
    steps = run(count, batch_size, stop=-(-4 * count // batch_size))
    assert all(len(ranks[0]) == batch_size for ranks in steps)  # no batch is short, not even at the end of an epoch
    flat = [index for ranks in steps for index in ranks[0]]
    epochs = [flat[i * count : (i + 1) * count] for i in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 16 or len(set(map(tuple, epochs))) == 4  # every epoch has another order


def some_lengths(count):
    return np.random.default_rng(3).integers(5, 200, count)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_records_of_similar_length_share_a_batch(world):
    count, size = 2 * 8 * GROUPED_STEPS, 8  # two blocks of steps to an epoch
    lengths = some_lengths(count)
    steps = [list(chain(*ranks)) for ranks in run(count, size, stop=4 * GROUPED_STEPS, world=world, lengths=lengths)]
    flat = list(chain(*steps))
    assert sorted(flat[:count]) == sorted(flat[count:]) == list(range(count)) and flat[:count] != flat[count:]
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    mixed = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for (step,) in run(count, size)]
    assert np.mean(spread) < 0.2 * np.mean(mixed)
    means = [np.mean([lengths[i] for i in step]) for step in steps[:GROUPED_STEPS]]
    assert means not in (sorted(means), sorted(means)[::-1])  # batches are not sorted by length


def test_every_record_once_an_epoch_when_grouped_by_length():
    # Blocks of steps and epochs end at different samples; still every record is used equally often.
    seen = Counter(chain(*(ranks[0] for ranks in run(50, 8, stop=25 * GROUPED_STEPS, lengths=some_lengths(50)))))
    assert set(seen.values()) == {8 * GROUPED_STEPS // 2}


def test_resuming_in_the_middle_of_a_block_of_similar_lengths():
    whole = run(200, 8, stop=40, world=2, lengths=some_lengths(200))
    for start in (0, 1, 7, 15, 16, 17, 39):
        assert run(200, 8, start=start, stop=40, world=2, lengths=some_lengths(200)) == whole[start:]


@pytest.mark.parametrize("group", [1, 2])
def test_the_same_batches_whatever_the_number_of_ranks(group):
    alone = run(22, 8, group=group)
    for world in (2, 4):
        shared = run(22, 8, world=world, group=group)
        assert all(len(part) == 8 // world for ranks in shared for part in ranks)
        assert [sorted(chain(*ranks)) for ranks in shared] == [sorted(ranks[0]) for ranks in alone]


def test_resuming_gives_the_rest_of_the_run():
    for world, group in ((1, 1), (2, 1), (2, 4)):
        whole = run(20, 8, world=world, group=group)
        for start in (0, 1, 2, 5, 13, 30):
            assert run(20, 8, start=start, world=world, group=group) == whole[start:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_groups_stay_together(world):
    # As train.py asks for it: the records, the batch and each rank's share hold whole groups.
    for ranks in run(24, 16, world=world, group=4):
        for part in ranks:
            assert part == [4 * (index // 4) + i for index in part[::4] for i in range(4)]


def test_an_incomplete_group_is_not_lost():
    steps = run(10, 5, stop=8, group=4)
    flat = [index for ranks in steps for index in ranks[0]]
    assert all(sorted(flat[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))


def test_seeds_differ():
    assert run(30, 6, seed=1) == run(30, 6, seed=1) != run(30, 6, seed=2)
    assert run(30, 6, seed=1)[0] != run(30, 6, seed=1)[5]
