import pytest, torch, train
from faults import finish
from safetensors.torch import load_file

R = {
    "prefix": ["--tune", "prefix"],
    "prompt": ["--tune", "prompt"],
    "houlsby": ["--tune", "houlsby"],
    "ia3": ["--tune", "ia3"],
    "dora": ["--lora", "llm", "--dora", "--lora-plus", 4, "--lora-dropout", 0],
}


def weights(f):
    (p,) = f.glob("adapter*.safetensors")
    return load_file(p)


@pytest.mark.parametrize("name", R)
def test_bf16(tiny, tmp_path, command, name):
    command(
        train,
        *tiny.flags["stage2"],
        *R[name],
        "--lr",
        1e-2,
        "--steps",
        3,
        "--dtype",
        "bfloat16",
        "--out",
        tmp_path / "a",
    )
    assert weights(tmp_path / "a")


@pytest.mark.parametrize("shard", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", ["prefix", "houlsby", "dora", "prompt", "ia3"])
def test_two(tiny, tmp_path, name, shard):
    argv = [*tiny.flags["stage2"], *R[name], "--lr", 1e-2, "--steps", 3, "--shard", shard]
    finish([*argv, "--out", tmp_path / "alone"])
    finish([*argv, "--out", tmp_path / "two"], ranks=2)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "two")
    for k, t in one.items():
        torch.testing.assert_close(two[k], t, rtol=1e-3, atol=2e-5)


def test_compile(tiny, tmp_path, command, compiler):
    command(train, *tiny.flags["stage2"], *R["prefix"], "--lr", 1e-2, "--steps", 3, "--out", tmp_path / "a")
    command(
        train, *tiny.flags["stage2"], *R["prefix"], "--lr", 1e-2, "--steps", 3, "--compile", "--out", tmp_path / "b"
    )
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    for k, t in one.items():
        torch.testing.assert_close(two[k], t, rtol=1e-3, atol=2e-5)
