"""Training: the worked numbers, and the same result however it is cut, interrupted or repeated."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BATCH, STEPS
from faults import finish, kill_at
from safetensors.torch import load_file, save_file

import train
from data import Records, collate
from formats.weights import load_model
from inputs.index import read_records
from inputs.mixture import Source, batches, epochs
from inputs.records import check_record
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from training import towers
from world.writer import make_records

REPOSITORY = Path(train.__file__).parent


def flags(*argv):
    return train.read_flags("", [str(value) for value in argv])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in log_of(folder)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(folder, other):
    return (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def refusal(command, *argv):
    """The one line that train.py ends with."""
    with pytest.raises(SystemExit) as caught:
        command(train, *argv)
    line = caught.value.code
    assert isinstance(line, str) and line.startswith("train.py: ") and len(line.splitlines()) == 1, line
    return line


def write_records(path, records):
    path.write_text(json.dumps(records))
    return path


def sources(path, images):
    return [Source(read_records(path), images)]


def blinded(record):
    """The record without its image."""
    first, *rest = record["conversations"]
    first = first | {"value": first["value"].replace("<image>\n", "")}
    return {"id": record["id"], "conversations": [first, *rest]}


# ---------------------------------------------------------------------------------------------------------------------
# the schedule


def test_learning_rate_of_the_worked_example():
    assert train.learning_rate(500, 1000, 2e-5, warmup=0.0) == pytest.approx(1e-5)
    # 3 % of 200 steps rise, so the cosine spans the 194 after step 6
    assert train.learning_rate(6 + 97, 200, 2e-5, warmup=0.03) == pytest.approx(1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 5198])  # 5198: LLaVA-1.5's stage 2
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_learning_rate_rises_in_a_line_and_falls_to_zero(steps, warmup):
    rates = [train.learning_rate(step, steps, 1.0, warmup) for step in range(steps)]
    rise = math.ceil(warmup * steps)
    assert rates[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert rates[0] > 0 and max(rates) == 1.0
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    assert train.learning_rate(steps, steps, 1.0, warmup) == pytest.approx(0, abs=1e-12) or rise == steps


# ---------------------------------------------------------------------------------------------------------------------
# how a new projector starts


@pytest.fixture
def whitened(tiny, monkeypatch):
    """Return the whitened features of a new projector's first layer, for some POSITION_GAIN: (N, P, C) each."""

    def call(gain):
        monkeypatch.setattr(towers, "POSITION_GAIN", gain)
        model = load_model(tiny.stage1)
        images = Records(
            sources(tiny.world / "captions.json", tiny.world), Tokenizer.load(tiny.stage1), model.config, 1024
        )
        pixels = torch.cat([image.pixels for image in images.load(images.images()).values()])
        layer = model.multi_modal_projector.linear_1
        with torch.no_grad():
            before = model.vision_features(pixels)
            layer.weight.copy_(torch.eye(len(layer.weight)))
            towers.whiten_projector(model, images)
            return before - before.mean((0, 1)), layer(before)

    return call


def test_whitening_takes_the_root_of_every_range(whitened):
    before, after = whitened(gain=1)
    assert after.mean((0, 1)).abs().max() < 1e-3 * after.std()
    ranges = [torch.linalg.eigvalsh(torch.cov(f.flatten(0, 1).T)).sqrt() for f in (before, after)]
    loud = ranges[0] > 0.2 * ranges[0].max()  # those far above the floor that keeps silent ones silent
    assert loud.sum() > 5
    assert torch.allclose(ranges[1][loud], ranges[0][loud].sqrt(), rtol=0.02)


def test_whitening_lifts_what_says_where(whitened):
    def places(features):  # share of the variance that where a patch is explains
        return float(features.mean(0).square().sum() / features.square().mean(0).sum())

    plain, lifted = (places(whitened(gain)[1]) for gain in (1, 4))
    assert plain < 0.3 and lifted > 2 * plain


# ---------------------------------------------------------------------------------------------------------------------
# what trains


def groups_of(model, *more):
    args = flags("--stage", 2, "--lr", 1e-3, *more)
    train.choose_trainable(model, args.train)
    return train.make_optimizer(model, args, train.Distributed("cpu")).param_groups


@pytest.mark.parametrize("names", ["projector", "llm", "vision", "projector,llm", "vision,projector,llm"])
def test_groups_are_a_partition_of_what_trains(tiny, names):
    model = load_model(tiny.stage1)
    groups = groups_of(model, "--train", names, "--weight-decay", 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    trains = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(held) == len(set(held)) and set(held) == set(trains)
    component = {"projector": "multi_modal_projector", "llm": "language_model", "vision": "vision_tower"}
    assert {group["component"] for group in groups} == {component[name] for name in names.split(",")}


def test_every_component_has_its_own_rate_and_only_matrices_decay(tiny):
    own = ["--train", "vision,projector,llm", "--lr-projector", 1e-4, "--lr-vision", 1e-5, "--weight-decay", 0.1]
    groups = groups_of(load_model(tiny.stage1), *own)
    peaks = {"language_model": 1e-3, "multi_modal_projector": 1e-4, "vision_tower": 1e-5}
    assert all(group["peak"] == peaks[group["component"]] for group in groups)
    assert all(group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0) for group in groups for p in group["params"])


def test_a_rate_of_zero_is_zero(tiny):
    groups = groups_of(load_model(tiny.stage1), "--lr-projector", 0)
    assert {group["component"]: group["peak"] for group in groups}["multi_modal_projector"] == 0


@pytest.mark.parametrize("layer, used", [(-2, 1), (-1, 2), (1, 1)])
def test_of_the_tower_only_what_the_features_depend_on_trains(tiny, layer, used):
    model = load_model(tiny.stage1)
    model.config.vision_feature_layer = layer
    train.choose_trainable(model, ("vision",))
    model.vision_features(torch.randn(1, 3, 72, 72)).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {name.split("layers.")[1].split(".")[0] for name in trains if "layers." in name}
    assert blocks == set(map(str, range(used)))
    assert not any("post_layernorm" in name for name in trains)
    # A key's bias moves every score of a query alike, so its gradient is nothing but rounding.
    assert {name for name in trains if "k_proj.bias" not in name} <= reached


def test_each_stage_changes_its_own_part_and_no_other_bit(tiny):
    clip, decoder, one, two = (weights(tiny.folders[name]) for name in ("clip", "decoder", "stage1", "stage2"))
    tower = [key for key in one if key.startswith("vision_tower.")]
    assert tower and all(torch.equal(one[key], clip[key.removeprefix("vision_tower.")]) for key in tower)
    language = [key for key in one if key.startswith("language_model.")]
    assert language and all(torch.equal(one[key], decoder[key.removeprefix("language_model.")]) for key in language)
    changed = {key for key in two if not torch.equal(one[key], two[key])}
    assert {key.split(".")[0] for key in changed} == {"language_model", "multi_modal_projector"}
    assert changed == {key for key in two if key not in tower}


def test_a_tower_that_trains_changes_up_to_its_last_used_block(tiny, command, tmp_path):
    command(train, *tiny.flags["stage2"], "--out", tmp_path / "run", "--steps", 2, "--train", "vision,projector,llm")
    before, after = weights(tiny.stage1), weights(tmp_path / "run")
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    unused = {key for key in after if "encoder.layers.1." in key or "post_layernorm" in key}
    assert unused and changed == set(after) - unused


# ---------------------------------------------------------------------------------------------------------------------
# the same, however it is cut


def gradients(model, args, micro, ranks=None):
    """Return the gradients of one step, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = {}
    optimizer = SimpleNamespace(
        param_groups=[{"params": list(named.values()), "peak": 1.0, "component": "all"}],
        step=lambda: result.update({name: p.grad.clone() for name, p in named.items()}),
        zero_grad=lambda set_to_none: model.zero_grad(set_to_none),
    )
    row = train.train_step(args, ranks or train.Distributed("cpu"), model, optimizer, micro, step=0)
    return result, row


@pytest.mark.parametrize("names", ["projector", "projector,llm", "vision,projector,llm"])
def test_a_batch_of_eight_is_eight_micro_batches_of_one(tiny, tmp_path, names):
    records = json.loads((tiny.world / "instruct.json").read_text())[:BATCH]
    records[3] = blinded(records[3])  # its micro-batch holds no image at all
    records[5]["conversations"][1:] = [{"from": "gpt", "value": "7"}]  # two supervised tokens among hundreds
    tokenizer, model = Tokenizer.load(tiny.stage1), load_model(tiny.stage1).train()
    mine = sources(write_records(tmp_path / "some.json", records), tiny.world)
    dataset = Records(mine, tokenizer, model.config, 1024)
    samples = [dataset[i] for i in range(BATCH)]
    assert len({len(sample["ids"]) for sample in samples}) > 4  # ragged
    args = flags("--stage", 2, "--train", names, "--clip-grad", 0)
    train.choose_trainable(model, args.train)
    whole, row = gradients(model, args, [collate(samples, tokenizer.pad_id)])
    cut, cut_row = gradients(model, args, [collate([sample], tokenizer.pad_id) for sample in samples])
    apart = math.sqrt(sum((whole[name] - cut[name]).square().sum().item() for name in whole))
    assert apart <= 1e-6 * math.sqrt(sum(g.square().sum().item() for g in whole.values()))
    assert cut_row["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert cut_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)


def old_mean(model, micro):
    """Transformers before 4.46: the mean over micro-batches of each one's mean over its supervised tokens."""
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro]
    return sum(model(**batch) / count for batch, count in zip(micro, counts) if count) / len(micro)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("silent", [False, True])
def test_the_mean_of_micro_batches_is_that_of_old_transformers(tiny, tmp_path, world, silent):
    records = json.loads((tiny.world / "instruct.json").read_text())[:BATCH]
    records[5]["conversations"][1:] = [{"from": "gpt", "value": "7"}]
    tokenizer, model = Tokenizer.load(tiny.stage1), load_model(tiny.stage1).train()
    dataset = Records(
        sources(write_records(tmp_path / "some.json", records), tiny.world), tokenizer, model.config, 1024
    )
    micro = [collate([dataset[i], dataset[i + 1]], tokenizer.pad_id) for i in range(0, BATCH, 2)]
    if silent:
        micro[1]["labels"].fill_(IGNORE)
    args = flags("--stage", 2, "--clip-grad", 0, "--loss-mean", "micro-batch")
    train.choose_trainable(model, args.train)
    loss = old_mean(model, micro)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    supervised = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro)
    got = []
    for rank in range(world):  # what DDP would average
        ranks = SimpleNamespace(
            rank=0,
            world_size=world,
            device=torch.device("cpu"),
            all_reduce_sum=lambda *_: [supervised],
            all_reduce=lambda total: None,
        )
        got.append(gradients(model, args, micro[rank::world], ranks))
    losses = [row["loss"] for _, row in got]
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-6)
    apart = sum((sum(g[name] for g, _ in got) / world - wanted[name]).square().sum().item() for name in wanted)
    assert math.sqrt(apart) <= 1e-6 * math.sqrt(sum(g.square().sum().item() for g in wanted.values()))
    token = gradients(model, flags("--stage", 2, "--clip-grad", 0), micro)[1]["loss"]
    assert abs(token / loss.item() - 1) > 1e-4  # so the two means are not the same by chance


def test_no_supervised_token_at_all_is_nought(tiny):
    tokenizer, model = Tokenizer.load(tiny.stage1), load_model(tiny.stage1).train()
    dataset = Records(sources(tiny.world / "instruct.json", tiny.world), tokenizer, model.config, 1024)
    batch = collate([dataset[0]], tokenizer.pad_id)
    batch["labels"].fill_(IGNORE)
    for mean in ("token", "micro-batch"):
        args = flags("--stage", 2, "--loss-mean", mean)
        train.choose_trainable(model, args.train)
        found, row = gradients(model, args, [batch, batch])
        assert row["loss"] == row["grad_norm"] == 0 and not any(g.any() for g in found.values())


def test_accumulated_runs_end_alike(tiny, command, tmp_path):
    rate = ["--lr", 1e-4]  # Adam turns a gradient that is all rounding into a step of this size
    for accumulate in (1, 8):
        out = tmp_path / str(accumulate)
        command(train, *tiny.flags["stage2"], *rate, "--out", out, "--accumulate", accumulate)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "8"), rel=1e-5)
    one, eight = weights(tmp_path / "1"), weights(tmp_path / "8")
    assert all(torch.allclose(one[key], eight[key], rtol=0, atol=1e-5) for key in one)


def test_cached_features_are_those_computed_each_time(tiny, command, tmp_path):
    command(train, *tiny.flags["stage1"], "--out", tmp_path / "run", "--cache-gb", 0)
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny.stage1), abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "decoder", "stage1", "stage2"])
def test_twice_is_the_same(tiny, command, tmp_path, name):
    command(train, *tiny.flags[name], "--out", tmp_path / "run")
    again = tmp_path / "run" / (name if name in ("clip", "decoder") else "")
    assert same_weights(again, tiny.folders[name]) and losses(again) == losses(tiny.folders[name])
    for file in ("config.json", "tokenizer.json"):
        assert (again / file).read_bytes() == (tiny.folders[name] / file).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# held-out data


def watching(tiny, tmp_path, *more):
    records = json.loads((tiny.world / "instruct.json").read_text())[-5:]
    records[2] = blinded(records[2])
    mine = write_records(tmp_path / "watched.json", records)
    return [*tiny.flags["stage2"], "--val", mine, "--images", tiny.world, "--val-every", 2, *more]


def test_the_loss_on_held_out_data_is_that_of_the_finished_model(tiny, command, tmp_path):
    command(train, *watching(tiny, tmp_path), "--out", tmp_path / "run")
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert losses(tmp_path / "run") == losses(tiny.stage2)  # looking changes nothing
    model, tokenizer = load_model(tmp_path / "run").eval(), Tokenizer.load(tmp_path / "run")
    dataset = Records(sources(tmp_path / "watched.json", tiny.world), tokenizer, model.config, 1024)
    batches = [collate([sample], tokenizer.pad_id) for sample in (dataset[i] for i in range(5))]
    with torch.no_grad():
        total = sum(float(model(**batch)) for batch in batches)
    count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    assert rows[-1]["val_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("killed", [None, 5, 8])
def test_patience_ends_a_run_and_keeps_the_best(tiny, command, tmp_path, monkeypatch, killed):
    """Losses of 3, 2, 1, 2, 3 on held-out data: the third look is the best. Uninterrupted, or on either side of it."""
    kept, step = {}, train.train_step

    def look(args, ranks, model, *_):
        done = len((args.out / "log.jsonl").read_text().splitlines()) + 1
        kept[done] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return 1.0 + abs(3 - done // 2)

    monkeypatch.setattr(train, "validation_loss", look)
    argv = [*watching(tiny, tmp_path, "--patience", 2), "--steps", 20, "--save-every", 3, "--out", tmp_path / "run"]
    if killed:
        monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0 if args[-1] == killed else step(*args))
        with pytest.raises(ZeroDivisionError):
            command(train, *argv)
        monkeypatch.setattr(train, "train_step", step)
        argv.append("--resume")
    command(train, *argv)
    assert [row["val_loss"] for row in log_of(tmp_path / "run") if "val_loss" in row] == [3, 2, 1, 2, 3]
    finished = weights(tmp_path / "run")
    trained = [name for name in finished if name in kept[6] and not torch.equal(kept[6][name], kept[10][name])]
    assert len(trained) > 10 and all(torch.equal(finished[name], kept[6][name]) for name in trained)
    assert not list((tmp_path / "run").glob("best-*"))


# ---------------------------------------------------------------------------------------------------------------------
# two ranks

# A start of torchrun costs seconds, so one start runs every command, each with a corner of the store of its own. Kept
# of each: the first step's gradients, whole, and what every rank holds in the end. Of "poisoned", the last rank's
# second loss is not a number; of "diverged", one of its weights is off by a bit from then on.
RANK = """
import json, os, sys
import torch
import train

torch.set_num_threads(1)
fit, clip, forward = train.fit, train.meters.clip_gradients, train.Llava.forward

def fit_and_keep(args, ranks, run, model, *rest, **more):
    first, passes = [], []

    def clip_and_keep(optimizer, norm, most):
        if not first:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            first.extend(g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients)
        clip(optimizer, norm, most)

    def forward_or_poison(*args, **batch):
        passes.append(1)
        now = ranks.rank == ranks.world_size - 1 and len(passes) == 3  # the first is no step, machine.py makes it
        poison = "poisoned" in run.folder.name and now
        if "diverged" in run.folder.name and now:
            p = next(model.multi_modal_projector.parameters()).data.view(-1)
            p[0] = p[0].nextafter(p[0] + 1)
        return forward(*args, **batch) * (float("nan") if poison else 1)

    train.meters.clip_gradients, train.Llava.forward = clip_and_keep, forward_or_poison
    fit(args, ranks, run, model, *rest, **more)
    state = {name: tensor for name, tensor in model.state_dict().items() if args.shard != "fsdp"}
    torch.save({"state": state, "gradients": first}, f"{args.out}-rank{ranks.rank}.pt")

train.fit = fit_and_keep
for attempt, argv in enumerate(json.loads(open(sys.argv[1]).read())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    sys.argv = ["train.py", *argv]
    try:
        train.main()
    except ValueError as error:
        if "diverged" not in argv[-1]:
            raise
        open(f"{argv[-1]}-rank{os.environ['RANK']}.txt", "w").write(str(error))
"""


def run_all(root, commands, suffix, *launch):
    """Let one process, or torchrun's, go through all of the commands."""
    lines = [[str(value) for value in [*argv, "--out", root / (name + suffix)]] for name, argv in commands.items()]
    (root / "commands.json").write_text(json.dumps(lines))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *launch, root / "rank.py", root / "commands.json"]
    with (root / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            status = process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun hands it on to its ranks
            process.wait()
            status = "hangs"
    assert status == 0, (root / "output.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    """A folder with every command's run on one rank (NAME-alone) and on two (NAME), and what each rank then held."""
    root = tmp_path_factory.mktemp("ranks")
    captions = json.loads((tiny.world / "captions.json").read_text())[: 3 * BATCH]
    dialogues = json.loads((tiny.world / "instruct.json").read_text())[: 3 * BATCH]
    # Three steps are one epoch: one batch of text, one of images, and one with a single image, that one rank gets.
    lopsided = {
        name: write_records(root / f"{name}.json", [blinded(r) if i < 2 * BATCH - 1 else r for i, r in enumerate(part)])
        for name, part in (("captions", captions), ("dialogues", dialogues))
    }
    short = ["--steps", 3, "--lr", 1e-4]  # as above: a small rate, for the sake of gradients that are all rounding
    watch = ["--val", write_records(root / "watch.json", captions[:5]), "--images", tiny.world, "--val-every", 2]
    commands = {
        "clip": [*tiny.flags["clip"], *short],
        "stage2": [*tiny.flags["stage2"], *short],
        "accumulated": [*tiny.flags["stage2"], *short, "--accumulate", 2],
        "poisoned": [*tiny.flags["stage2"], *short],
        "zero1": [*tiny.flags["stage2"], *short, *watch, "--shard", "zero1", "--accumulate", 2],
        "fsdp": [*tiny.flags["stage2"], *short, *watch, "--shard", "fsdp", "--accumulate", 2, "--recompute"],
        "fsdp1": [*tiny.flags["stage1"], *short, "--shard", "fsdp"],
        "lopsided1": [*tiny.flags["stage1"], *short, "--data", lopsided["captions"], "--images", tiny.world],
        "lopsided2": [*tiny.flags["stage2"], *short, "--data", lopsided["dialogues"], "--images", tiny.world],
    }
    commands["lopsided_vision"] = [*commands["lopsided2"], "--train", "vision,projector,llm"]
    commands["lopsided_fsdp"] = [*commands["lopsided_vision"], "--shard", "fsdp"]
    (root / "rank.py").write_text(RANK)
    run_all(root, commands, "-alone")
    commands["diverged"] = [*commands["stage2"], "--save-every", 1]
    run_all(root, commands, "", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return root


THREADS = """
import json, os, pathlib, sys
import train
for attempt, argv in enumerate(json.loads(open(sys.argv[1]).read())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    sys.argv = ["train.py", *argv]
    train.main()
    names = [(path / "comm").read_text().strip() for path in pathlib.Path("/proc/self/task").iterdir()]
    left = sum("gloo" in name for name in names)
    os.write(1, f"threads of gloo left: {left}\\n".encode())  # in one piece: two ranks share the file
"""


def test_no_thread_of_gloo_outlives_a_run(tiny, tmp_path):
    """A thread that still runs when the interpreter exits aborts the process, now and then."""
    commands = {mode: [*tiny.flags["stage2"], "--steps", 2, "--shard", mode] for mode in ("ddp", "fsdp")}
    (tmp_path / "rank.py").write_text(THREADS)
    run_all(tmp_path, commands, "", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    text = (tmp_path / "output.txt").read_text()
    assert text.count("threads of gloo left: 0") == 2 * len(commands)


SHARED = [
    "stage2",
    "accumulated",
    "zero1",
    "fsdp",
    "fsdp1",
    "lopsided1",
    "lopsided2",
    "lopsided_vision",
    "lopsided_fsdp",
]


@pytest.mark.parametrize("name", SHARED)
def test_gradients_are_the_same_however_the_work_is_shared(ranks, name):
    alone = torch.load(ranks / f"{name}-alone-rank0.pt", weights_only=True)["gradients"]
    shared = torch.load(ranks / f"{name}-rank0.pt", weights_only=True)["gradients"]
    apart = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(alone, shared, strict=True)))
    assert apart <= 1e-6 * math.sqrt(sum(g.square().sum().item() for g in alone))


def test_a_batch_in_which_one_rank_sees_an_image_is_among_them(ranks, tiny):
    config, tokenizer = load_model(tiny.stage1).config, Tokenizer.load(tiny.stage1)
    dataset = Records(sources(ranks / "dialogues.json", tiny.world), tokenizer, config, 1024)
    order = epochs(dataset.sizes, [1.0], 0)
    seen = [
        [len(dataset.image_names(i, dataset.record(i))) for i in step]
        for rank in (0, 1)
        for step in batches(order, BATCH, 0, 0, 3, rank=rank, world=2, lengths=dataset.lengths())
    ]
    counts = sorted(zip(map(sum, seen[:3]), map(sum, seen[3:])))
    assert counts == [(0, 0), (0, 1), (4, 4)]


def test_a_bit_that_differs_between_ranks_ends_both(ranks):
    for rank in (0, 1):
        line = (ranks / f"diverged-rank{rank}.txt").read_text()
        assert "step 2: the ranks' weights differ" in line and "checkpoint-000001" in line
    assert [path.name for path in (ranks / "diverged").glob("checkpoint-*")] == ["checkpoint-000001"]


def test_a_loss_that_is_no_number_on_one_rank_is_left_out_by_all(ranks):
    for name in ("poisoned", "poisoned-alone"):
        assert [row["step"] for row in log_of(ranks / name) if "skipped" in row] == [2]
    one, two = weights(ranks / "poisoned-alone"), weights(ranks / "poisoned")
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-5) for key in one)


@pytest.mark.parametrize("name", ["stage2", "accumulated", "zero1", "fsdp", "fsdp1", "lopsided1", "lopsided2"])
def test_two_ranks_end_where_one_does(ranks, name):
    one, two = weights(ranks / f"{name}-alone"), weights(ranks / name)
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-5) for key in one)
    assert losses(ranks / name) == pytest.approx(losses(ranks / f"{name}-alone"), rel=1e-5)
    both = [[row["val_loss"] for row in log_of(ranks / run) if "val_loss" in row] for run in (name, f"{name}-alone")]
    assert both[0] == pytest.approx(both[1], rel=1e-5) and len(both[0]) == 2 * (name in ("zero1", "fsdp"))


@pytest.mark.parametrize("name", ["clip", "lopsided_vision", "lopsided_fsdp"])
def test_two_ranks_lose_what_one_does(ranks, name):
    # Not the weights: CLIP's key biases have gradients of rounding only, which Adam blows up to whole steps.
    folders = [ranks / name / "clip", ranks / f"{name}-alone/clip"]
    if name != "clip":
        folders = [ranks / name, ranks / f"{name}-alone"]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "stage2", "accumulated", "poisoned", "zero1", "lopsided1", "lopsided_vision"])
def test_replicas_stay_equal(ranks, name):
    first, second = (torch.load(ranks / f"{name}-rank{rank}.pt", weights_only=True)["state"] for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed


# Run, function, the path it is given ("": any), which of those calls, and something that must lie there then.
# Checkpoints come after steps 2 and 4.
INSTANTS = {
    "clip, training": ("clip", "train.train_step", "", 6, "checkpoint-000004/trained.safetensors"),
    "decoder, inside a checkpoint": (
        *("decoder", "inputs.files.fsync", "checkpoint-000004.partial/trained.safetensors", 1),
        "checkpoint-000004.partial/optimizer.safetensors",
    ),
    "stage1, before a checkpoint": ("stage1", "train.train_step", "", 2, "log.jsonl"),
    "stage1, published but not marked": ("stage1", "training.runs.write_json", "run/run.json", 2, "model.safetensors"),
    "stage2, between two checkpoints": ("stage2", "shutil.rmtree", "checkpoint-000002", 1, "checkpoint-000004"),
    "stage2, half of the files in place": ("stage2", "os.replace", "final/model.safetensors", 1, "config.json"),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_resumed_is_bitwise_uninterrupted(tiny, command, tmp_path, instant):
    name, function, path, calls, left = INSTANTS[instant]
    argv = [*tiny.flags[name], "--keep", 1, "--out", tmp_path / "run"]
    kill_at(argv, (function, path, calls, tmp_path / "here"))
    folder, reference = tmp_path / "run" / (name if name in ("clip", "decoder") else ""), tiny.folders[name]
    assert (folder / left).exists()
    if ".partial" in left:  # make it as torn as can be
        (folder / left).write_bytes((folder / left).read_bytes()[:100])
    assert not json.loads((folder / "run.json").read_text()).get("finished")
    command(train, *argv, "--resume")
    assert same_weights(folder, reference)
    assert [row["step"] for row in log_of(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(reference)
    assert (
        json.loads((folder / "run.json").read_text())["loss"]
        == json.loads((reference / "run.json").read_text())["loss"]
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in reference.iterdir())


@pytest.mark.parametrize("ranks, shard, then", [(2, "zero1", 1), (2, "fsdp", 1), (1, "ddp", 2)])
def test_a_run_goes_on_with_other_ranks(tiny, tmp_path, ranks, shard, then):
    argv = [*tiny.flags["stage2"], "--lr", 1e-4, "--out", tmp_path / "run"]
    alone = [*tiny.flags["stage2"], "--lr", 1e-4, "--out", tmp_path / "alone"]
    kill_at([*argv, "--shard", shard], ("train.train_step", "", 6, tmp_path / "here"), ranks)
    assert (tmp_path / "run/checkpoint-000004/manifest.json").exists()
    finish([*argv, "--resume", "--shard", "fsdp" if then == 2 else "ddp"], then)
    finish(alone)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "run")
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-5) for key in one)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_recomputed_activations_give_the_same_gradients(tiny):
    args, tokenizer = flags("--stage", 2, "--train", "vision,projector,llm"), Tokenizer.load(tiny.stage1)
    model = load_model(tiny.stage1).train()
    train.choose_trainable(model, args.train)
    dataset = Records(sources(tiny.world / "instruct.json", tiny.world), tokenizer, model.config, 1024)
    micro = [collate([dataset[i] for i in range(4)], tokenizer.pad_id)]
    kept, _ = gradients(model, args, micro)
    model.language_model.model.recompute = model.vision_tower.vision_model.recompute = True
    again, _ = gradients(model, args, micro)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_in_bfloat16_what_stands_still_is_saved_as_it_came(tiny, command, tmp_path, stage):
    argv = [*tiny.flags[stage], "--dtype", "bfloat16", "--out", tmp_path / "run"]
    command(train, *argv)
    narrow, wide = weights(tmp_path / "run"), weights(tiny.folders[stage])
    same = {key for key in narrow if torch.equal(narrow[key], wide[key])}
    trained = ("multi_modal_projector",) if stage == "stage1" else ("multi_modal_projector", "language_model")
    assert same == {key for key in narrow if not key.startswith(trained)}
    assert all(narrow[key].dtype == torch.float32 for key in narrow)
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny.folders[stage]), rel=0.02)


def test_states_of_bfloat16_when_asked(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setattr(train.runs.Run, "finish", lambda *_: None)
    argv = [*tiny.flags["stage2"], "--dtype", "bfloat16", "--weights", "bfloat16", "--out", tmp_path / "run"]
    command(train, *argv)
    kept = load_file(tmp_path / "run/latest/optimizer.safetensors")
    assert {value.dtype for key, value in kept.items() if not key.endswith(".step")} == {torch.bfloat16}


def test_a_finished_run_is_not_trained_again(tiny, command, tmp_path):
    shutil.copytree(tiny.stage1, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    command(train, *tiny.flags["stage1"], "--out", tmp_path / "run", "--resume")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_a_resumed_run_keeps_its_towers_though_newer_ones_have_come(tiny, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.root / "stage0", "out/old")
    argv = [value for value in tiny.flags["stage1"] if value not in ("--vision", tiny.clip, "--llm", tiny.decoder)]
    argv += ["--out", tmp_path / "run"]
    step = train.train_step

    def interrupted(*args):
        if args[-1] == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit):
        command(train, *argv)
    monkeypatch.setattr(train, "train_step", step)
    shutil.copytree(tiny.root / "stage0", "out/new")
    for part in ("clip", "decoder"):
        values = json.loads(Path("out/new", part, "run.json").read_text())
        Path("out/new", part, "run.json").write_text(json.dumps(values | {"finished": values["finished"] + 1000}))
        other = {key: 0.5 * value for key, value in weights(Path("out/new", part)).items()}
        save_file(other, Path("out/new", part, "model.safetensors"))
    command(train, *argv, "--resume")
    assert same_weights(tmp_path / "run", tiny.stage1)


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves


@pytest.mark.parametrize("name", ["clip", "decoder", "stage1", "stage2"])
def test_what_a_run_leaves(tiny, name):
    folder = tiny.folders[name]
    rows = log_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "lr", "grad_norm", "grad_norms", "supervised"}
    keys |= {"tokens_per_s", "samples_per_s", "data_wait", "memory_gb"}
    assert all(set(row) == keys for row in rows)
    assert all(row["grad_norm"] > 0 and row["tokens_per_s"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
    assert all(math.hypot(*row["grad_norms"].values()) == pytest.approx(row["grad_norm"]) for row in rows)
    values = json.loads((folder / "run.json").read_text())
    assert values["finished"] and values["stage"] == (int(name[-1]) if name[-1].isdigit() else 0)
    assert values["batch_size"] == BATCH
    assert losses(folder)[-1] < losses(folder)[0]
    names = {path.name for path in folder.iterdir()}
    files = {"run.json", "log.jsonl", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files |= set() if name == "clip" else {"generation_config.json", "chat_template.jinja"}
    files |= {"preprocessor_config.json", "processor_config.json"} if name.startswith("stage") else set()
    assert names - {"loss.png"} == files


def test_the_loss_is_drawn(tiny):
    pytest.importorskip("matplotlib")
    assert (tiny.stage2 / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_data_of_ones_own(tiny, command, tmp_path):
    records = json.loads((tiny.world / "instruct.json").read_text())[:6]
    records[1] = blinded(records[1])
    records[2]["image"] = [records[2]["image"]]
    said = [{"from": "human", "value": "What is <img> for?"}, {"from": "gpt", "value": "For </s> a picture."}]
    records[3] = {"id": "text", "image": None, "conversations": said}
    mine = write_records(tmp_path / "mine.json", records)
    argv = [*tiny.flags["stage2"], "--data", mine, "--images", tiny.world, "--steps", 3, "--batch-size", 4]
    command(train, *argv, "--out", tmp_path / "first")
    command(train, *argv, "--out", tmp_path / "either", "--image-order", "either")
    assert losses(tmp_path / "first") != losses(tmp_path / "either")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "first") + losses(tmp_path / "either"))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_shortest_dialogues_of_the_world_can_be_trained_on(turns):
    for index in range(300):
        for record in make_records(0, index, turns)[1]:
            check_record(record)


@pytest.mark.parametrize("name", ["decoder", "stage1", "stage2"])
def test_dialogues_can_be_cut_into_single_questions(tiny, command, tmp_path, monkeypatch, name):
    seen = []
    monkeypatch.setattr(train, "fit", lambda args, ranks, run, model, dataset, *rest, **more: seen.append(dataset))
    for flags in ([], ["--questions", 1]):
        command(train, *tiny.flags[name], *flags, "--out", tmp_path / f"{len(flags)}")
    whole, cut = seen
    texts, all_texts = (
        [message["value"] for i in range(len(data)) for message in data.record(i)["conversations"][1::2]]
        for data in (cut, whole)
    )
    assert texts == all_texts
    assert len(cut) == len(texts) >= len(whole) and (name == "stage1" or len(cut) > len(whole))


def test_images_start_from_the_folder_of_the_data(tiny, command, tmp_path):
    shutil.copytree(tiny.world / "train-0", tmp_path / "train-0")
    shutil.copy(tiny.world / "captions.json", tmp_path)
    command(train, *tiny.flags["stage1"], "--data", tmp_path / "captions.json", "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tiny.stage1)


# ---------------------------------------------------------------------------------------------------------------------
# one line for what a user can mend


@pytest.mark.parametrize("argv, name", [
    (["--stage", "2", "--lerning-rate", "1"], "--lerning-rate"),
    (["--stage", "2", "--step", "3"], "--step"),  # no abbreviations: tomorrow's flag may make them ambiguous
    (["--stage", "2", "--compile", "False"], "False"),
    (["--stage", "2", "--train", "projektor"], "--train"),
    (["--stage", "2", "--train", ""], "--train"),
    (["--stage", "3"], "--stage"),
    ([], "--stage"),
    (["--stage", "1", "--steps", "0"], "--steps"),
    (["--stage", "1", "--lr", "-0.001"], "--lr must be a number, at least 0"),
    (["--stage", "1", "--seed", "20261130"], "--seed"),
    (["--stage", "1", "--lr-projector", "nan"], "--lr-projector must be a number, at least 0"),
    (["--stage", "1", "--batch-size", "-8"], "--batch-size"),
    (["--stage", "2", "--questions", "0"], "--questions"),
    (["--stage", "1", "--lr", "fast"], "--lr"),
    (["--stage", "1", "--template", "chatty"], "--template"),
])  # fmt: skip
def test_a_wrong_flag_is_named(command, tmp_path, monkeypatch, capsys, argv, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(train, *argv)
    assert caught.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["stage0", "stage1", "stage2"])
def test_a_folder_that_holds_a_run_is_not_trained_over(tiny, command, name):
    flag = tiny.flags["clip" if name == "stage0" else name]
    line = refusal(command, *flag, "--out", tiny.root / name)
    assert str(tiny.root / name) in line and "--resume" in line


def test_there_must_be_a_run_to_resume(tiny, command, tmp_path):
    assert str(tmp_path / "run") in refusal(command, *tiny.flags["stage1"], "--out", tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage, before", [(1, 0), (2, 1)])
def test_without_the_stage_before_both_ways_to_it_are_named(tiny, command, tmp_path, monkeypatch, stage, before):
    monkeypatch.chdir(tmp_path)
    line = refusal(command, "--stage", stage, "--world", tiny.world)
    assert f"train.py --stage {before}" in line and "name a folder" in line
    assert not list(tmp_path.iterdir())


def test_a_decoder_is_no_llava(tiny, command, tmp_path):
    line = refusal(command, "--stage", 2, "--model", tiny.decoder, "--world", tiny.world, "--out", tmp_path / "run")
    assert str(tiny.decoder) in line and "--vision" in line


def test_a_batch_that_cannot_be_cut_so(tiny, command, tmp_path):
    line = refusal(command, *tiny.flags["stage1"], "--accumulate", 3, "--out", tmp_path / "run")
    assert "--batch-size 8" in line and "3" in line


@pytest.mark.parametrize("cache", [4, 0])
def test_a_missing_image_and_its_record_are_named(tiny, command, tmp_path, cache):
    records = json.loads((tiny.world / "captions.json").read_text())[:BATCH]
    records[5] |= {"id": "the sixth", "image": "nowhere.png"}
    mine = write_records(tmp_path / "mine.json", records)
    argv = [*tiny.flags["stage1"], "--data", mine, "--images", tiny.world, "--cache-gb", cache]
    line = refusal(command, *argv, "--out", tmp_path / "run")
    assert "nowhere.png" in line and "mine.json" in line and "the sixth" in line


def test_a_folder_that_holds_no_world_is_left_alone(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_world", lambda folder, *_: (folder / "instruct.json").write_text("[]"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    argv = [tmp_path / "photos" if value == tiny.world else value for value in tiny.flags["stage1"]]
    assert "photos" in refusal(command, *argv, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_run_that_diverges_stops_before_it_is_saved(tiny, command, tmp_path):
    line = refusal(command, *tiny.flags["stage2"], "--lr", 1e30, "--clip-grad", 0, "--out", tmp_path / "run")
    assert "step 5" in line and "4 steps in a row" in line and "nan" in line
    assert losses(tmp_path / "run") == [losses(tiny.stage2)[0], None, None, None, None]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "log.jsonl", "lock"}


def test_a_shell_sees_status_one_and_one_line(tiny, tmp_path):
    mine = write_records(tmp_path / "mine.json", [{"id": 7, "conversations": [{"from": "gpt", "value": "a cat"}]}])
    argv = [*map(str, tiny.flags["stage1"]), "--data", str(mine), "--out", str(tmp_path / "run")]
    result = subprocess.run([sys.executable, REPOSITORY / "train.py", *argv], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("train.py: ") and "mine.json: record 0 (id 7)" in line and "human" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("blind", [True, False])
def test_a_projector_without_a_gradient_is_named_once(tiny, command, tmp_path, capsys, blind):
    records = json.loads((tiny.world / "instruct.json").read_text())[:BATCH]
    mine = write_records(tmp_path / "mine.json", [blinded(record) if blind else record for record in records])
    argv = [*tiny.flags["stage2"], "--data", mine, "--images", tiny.world, "--out", tmp_path / "run"]
    command(train, *argv)
    error = capsys.readouterr().err
    line = f"the projector learns nothing: its gradient was exactly 0 in {STEPS} steps"
    assert error.count(line) == error.count("no record has an image") == blind


def test_the_names_of_special_tokens_are_not_in_the_vocabulary_of_stage_0(tiny):
    vocabulary = json.loads((tiny.decoder / "tokenizer.json").read_text())["model"]["vocab"]
    assert not [token for token in vocabulary if "eos" in token or (len(token) > 1 and "{" in token)]
