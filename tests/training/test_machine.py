"""The lines about the machine that a run prints before it starts: busy cores, memory."""

from types import SimpleNamespace

import pytest
import torch

from training import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def share(value):
    return lambda threads: value


@pytest.mark.parametrize("value, warns", [(0.31, True), (0.79, True), (0.8, False), (0.99, False)])
def test_busy_cores_are_named_with_the_remedy(value, warns):
    line = machine.busy_warning(CPU, 2, share(value))
    assert (line is not None) == warns
    if warns:
        assert f"{value:.0%} of 2 cores" in line and "OMP_NUM_THREADS=1" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("device, threads", [(CPU, 1), (GPU, 8)])
def test_one_thread_and_a_gpu_are_not_measured(device, threads):
    assert machine.busy_warning(device, threads, lambda threads: pytest.fail("measured")) is None


def test_the_measurement_is_a_share_and_leaves_the_threads_as_they_are():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    assert 0 < machine.core_share(threads, seconds=0.02) < 1.5
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("is_main", [True, False])
def test_only_rank_0_measures_and_prints(monkeypatch, is_main):
    lines, measured = [], []
    monkeypatch.setattr(machine, "busy_warning", lambda *_: measured.append(1) or "the cores are busy")
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10**12)
    ranks = SimpleNamespace(is_main=is_main, world_size=1, device=CPU, print0=lines.append)
    machine.check_machine(ranks, torch.nn.Linear(2, 2), "ddp", torch.float32, None)
    assert ("the cores are busy" in lines) == bool(measured) == is_main
