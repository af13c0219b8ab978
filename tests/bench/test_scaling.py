"""What scaling.py says on paper against what two ranks really hand to gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import scaling

REPOSITORY = Path(__file__).resolve().parents[2]

COUNTED = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from bench import scaling
from training import sharding
from training.ranks import Distributed

FACTORS = {"allreduce_": 2, "broadcast_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}

class Sent(TorchDispatchMode):
    # of a collective's tensors the largest is the whole one; a ring sends (N - 1) / N of it, for a sum twice
    bytes = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d::"):
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes += FACTORS[name.removeprefix("c10d::")] * max(sizes) * (ranks.world_size - 1) / ranks.world_size
        return function(*args, **(kwargs or {}))

torch.set_num_threads(1)
ranks, found = Distributed("cpu"), {}
for shard in sharding.MODES:
    model, batch = scaling.new_step(side=28, pictures=1, text=16, rows=2)
    sharding.shard_model(model, shard, ranks, torch.float32)
    optimizer = sharding.make_adamw([{"params": [p for p in model.parameters() if p.requires_grad]}], shard)
    network = sharding.wrap_model(model, shard)
    for _ in range(2):
        with Sent() as sent:
            network(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    found[shard] = sent.bytes
if ranks.is_main:
    print(json.dumps(found))
"""


def test_bytes_on_the_wire(tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(tmp_path / "counted.py")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    model, _ = scaling.new_step(side=28, pictures=1, text=16, rows=2)
    for shard, sent in found.items():
        ours = sum(scaling.wire_bytes(model, shard, 2, torch.float32).values())
        print(f"{shard}: on paper {ours:,}, sent {sent:,.0f}")
        assert ours == pytest.approx(sent, rel=0.01)
