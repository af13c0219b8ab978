"""The estimate of a training step's memory against what torch's allocator gives out, and against 7B's known sums."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_accuracy import KINDS, SPEEDRUN, SPEEDRUN_TOWER, allocated, batch_for, shaped

import train
from clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from data import DataError
from fast import heap, linear
from inputs.images import BadImage
from training import memory
from training.towers import Contrastive

TEXT = SPEEDRUN | {"num_hidden_layers": 2}
TOWER = SPEEDRUN_TOWER | {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2}


def close(model, batch, dtype=torch.float32):
    """Whether the estimate is at most 10 % off."""
    found, real = memory.estimate(model, "ddp", 1, dtype, batch), allocated(model, batch, dtype)
    print(f"estimated {found.peak / 1e6:.2f} MB, allocated {real / 1e6:.2f} MB")
    return found.peak == pytest.approx(real, rel=0.1)


@pytest.fixture(autouse=True)
def arithmetic_in_16_bits():
    """Which the estimate is for: some CPUs only emulate it, and widen."""
    with linear.not_emulated():
        yield


@pytest.mark.parametrize(("kind", "recompute"), [*((kind, False) for kind in KINDS), ("all", True), ("QLoRA", True)])
def test_the_estimate_is_what_torch_allocates(kind, recompute):
    model = shaped(TEXT, TOWER, kind, torch.float32, recompute)
    assert close(model, batch_for(model, 4, 120, 30))


@pytest.mark.parametrize(("kind", "recompute"), [("stage 1", False), ("stage 2", False), ("QLoRA", True)])
def test_in_bfloat16(kind, recompute):
    model = shaped(TEXT, TOWER, kind, torch.bfloat16, recompute)
    assert close(model, batch_for(model, 1, 60, 20), torch.bfloat16)


@pytest.mark.parametrize("supervised", [1, 40])
def test_logits_of_a_large_vocabulary(supervised):
    """What they take goes with the tokens that are supervised, not with all."""
    wide = {"vocab_size": 49152, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = shaped(TEXT | wide, TOWER, "stage 2", torch.float32, False)
    assert close(model, batch_for(model, 2, 80, supervised))


def test_features_kept_from_before_and_text_alone():
    model = shaped(TEXT, TOWER, "stage 2", torch.float32, False)
    batch = batch_for(model, 4, 120, 30)
    batch["vision_features"] = model.vision_features(batch.pop("pixel_values")).detach()
    assert close(model, batch)
    batch["input_ids"] = batch["input_ids"] * 0
    assert close(model, batch | {"vision_features": None})


def test_clip_too():
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=56, patch_size=14, **shape)
    clip = Contrastive(CLIPModel(CLIPConfig(vision, CLIPTextConfig(vocab_size=900, **shape), projection_dim=64)))
    ids = torch.randint(0, 900, (16, 20))
    assert close(clip, {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(16, 3, 56, 56)})


def test_nothing_is_changed_by_looking():
    model = shaped(TEXT, TOWER, "LoRA", torch.float32, True)
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    memory.estimate(model, "ddp", 1, torch.float32, batch_for(model, 2, 60, 20))
    torch.set_rng_state(state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_recomputing_keeps_less():
    found = [
        memory.estimate(model, "ddp", 1, torch.float32, batch_for(model, 8, 120, 30))
        for model in (shaped(SPEEDRUN, TOWER, "stage 2", torch.float32, recompute) for recompute in (False, True))
    ]
    assert found[1].activations < found[0].activations / 1.5 and found[1].peak < found[0].peak


def test_the_sums_of_adamw():
    model = shaped(TEXT, TOWER, "stage 2", torch.float32, False)
    batch = batch_for(model, 1, 100, 40)
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for shard, (w, g, s) in {"ddp": (1, 1, 1), "zero1": (1, 1, 8), "fsdp": (8, 8, 8)}.items():
        found = memory.estimate(model, shard, 8, torch.float32, batch)
        whole = memory.unsharded_bytes(model, torch.float32) if shard == "fsdp" else 0
        assert (found.weights - whole, found.gradients, found.states) == (weights // w, trained // g, 2 * trained // s)
        assert found.step > found.gradients  # buckets are there all along, and activations come on top


class Broken:
    """Three samples, the second of which cannot be read."""

    def __len__(self):
        return 3

    def sample(self, index):
        if index == 1:
            raise BadImage("torn")
        if index == 3:
            raise DataError("none")
        return {"ids": [1] * (index + 2), "labels": [1] * (index + 2)}


def test_the_largest_batch_leaves_out_what_is_broken():
    batch = train.largest_batch(Broken(), 4, pad_id=0)
    assert batch["input_ids"].shape == (4, 4) and (batch["input_ids"][:, -1] != 0).tolist() == [True, False] * 2


def test_what_cannot_fit_is_refused_before_it_starts(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], "--out", tmp_path / "run")
    line = caught.value.code
    assert "--shard fsdp" in line and "0.001" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()


FAULTS = """
import resource, sys, torch, heap
if sys.argv[1] == "kept":
    assert heap.keep_freed(torch.device("cpu"))
for _ in range(3):
    torch.zeros(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library")
def test_what_is_freed_is_not_fetched_again():
    root = Path(memory.__file__).parents[1]
    fetched = [int(subprocess.check_output([sys.executable, "-c", FAULTS, how], cwd=root)) for how in ("kept", "plain")]
    assert 4 * fetched[0] < fetched[1]  # pages


HOLES = """
import torch, heap
watch = heap.GiveBack(heap.keep_freed(torch.device("cpu")), heap.resident() + 200_000_000, 0)
kept = [torch.ones(2**18) for _ in range(800)][::2]  # of 800 MB every other one, so that no end of the heap is free
before = heap.resident()
x = torch.ones(1, requires_grad=True)
watch(2 * x)
print(before - heap.resident())
watch.limit += 10**12
freed = [torch.ones(2**18) for _ in range(300)]
del freed
before = heap.resident()
y = 2 * x
watch(y)
watch.limit = 0
held = before - heap.resident()
y.backward()
print(held, before - heap.resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library")
def test_above_its_limit_holes_go_back_to_the_system_forward_and_backward():
    root = Path(memory.__file__).parents[1]
    lines = subprocess.check_output([sys.executable, "-c", HOLES], cwd=root, text=True).splitlines()
    (forward,), (held, backward) = (map(int, line.split()) for line in lines)
    assert forward > 300e6  # of 400
    assert abs(held) < 10e6 and backward > 200e6  # what is below the limit stays


class Libc:
    trims = 0

    def malloc_trim(self, pad: int):
        self.trims += 1


@pytest.mark.skipif(not heap.STATM.exists(), reason="no Linux")
def test_where_nothing_is_a_hole_the_limit_moves_up():
    libc = Libc()
    watch = heap.GiveBack(libc, limit=heap.resident() // 2, holes=100_000_000)
    watch(torch.zeros(1))
    watch(torch.zeros(1))
    assert libc.trims == 1 and heap.resident() < watch.limit < heap.resident() + 200_000_000


GROWN = """
import os, sys, torch, heap
print(sys.argv[1:], flush=True)
heap.start_anew()
heap.keep_freed(torch.device("cpu"))
small = [torch.empty(2**18) for _ in range(20)]
first, end = min(t.data_ptr() for t in small), torch.empty(2**18)  # so that what is freed is not the heap's end
del small
large = torch.empty(19 * 2**18)
print(os.environ.get("GLIBC_TUNABLES"), first <= large.data_ptr() < first + 20 * 2**20)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is left alone where there is a GPU")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library")
def test_started_anew_a_program_has_its_arguments_and_one_hole_where_many_tensors_were(tmp_path):
    (tmp_path / "grown.py").write_text(GROWN)
    program, profiler = [tmp_path / "grown.py", "a b", "c"], ["-m", "cProfile", "-o", tmp_path / "profile"]
    plain = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    plain["PYTHONPATH"] = str(Path(memory.__file__).parents[1])

    def lines(*options, **told):
        command = [sys.executable, *options, *program]
        return subprocess.check_output(command, env=plain | told, text=True).splitlines()

    started = "['a b', 'c']"
    assert lines() == [started, started, "None True"]
    mine = "glibc.malloc.tcache_count=5"  # what the user has set stays, and a profiler is left alone
    assert lines(GLIBC_TUNABLES=mine)[:-1] == [started] and lines(GLIBC_TUNABLES=mine)[-1].startswith(mine)
    assert lines(*profiler)[:-1] == [started]
