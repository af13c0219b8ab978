"""One tiny world and one tiny LLaVA, made once in a few seconds and shared by the tests of the scripts."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from fast.compile import require_compiler
from formats.saving import save_model
from formats.weights import load_model
from inputs import cli
from inputs.tokenizer import Tokenizer
from world.speedrun import Runner
from world.writer import write_world

torch.set_num_threads(1)  # with more threads, sums are rounded in another order, and tests compare bits

STEPS, BATCH = 6, 8


@pytest.fixture(scope="session")
def command():
    """Call the main() of a script with these arguments, as a shell would."""

    def call(script, *argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
            cli.run(script.main, f"{script.__name__}.py")

    return call


@pytest.fixture
def in_process(command, monkeypatch):
    """Let a Runner of world/speedrun.py run its commands in this process; the list of the commands that ran."""
    ran = []

    def run(self, argv):
        ran.append(argv)
        name, *rest = argv[1:] if argv[0] == "-m" else argv
        script = importlib.import_module(name.removesuffix(".py"))
        if hasattr(script, "__path__"):  # a room: python -m runs its __main__
            script = importlib.import_module(f"{name}.__main__")
        command(script, *rest)
        return 0

    monkeypatch.setattr(Runner, "run", run)
    return ran


@pytest.fixture(scope="session")
def compiler():
    """Skips a test that compiles where torch.compile does not work."""
    try:
        require_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, command):
    """Folders of the world and of a finished run of each kind, and `flags`, which with --out repeat that run."""
    root = tmp_path_factory.mktemp("tiny")
    world, clip, decoder = root / "world", root / "stage0/clip", root / "stage0/decoder"
    write_world(world, 64, 0, 72, 20, 2)
    common = ["--world", world, "--steps", STEPS, "--batch-size", BATCH, "--save-every", 2]
    common += ["--device", "cpu", "--dtype", "float32"]
    flags = {
        "clip": ["--stage", 0, "--tower", "clip", "--size", "tiny", *common],
        "decoder": ["--stage", 0, "--tower", "decoder", "--size", "tiny", *common],
        "stage1": ["--stage", 1, "--vision", clip, "--llm", decoder, *common],
        "stage2": ["--stage", 2, "--model", root / "stage1", *common],
    }
    command(train, "--stage", 0, "--size", "tiny", *common, "--out", root / "stage0")
    command(train, *flags["stage1"], "--out", root / "stage1")
    command(train, *flags["stage2"], "--out", root / "stage2")
    folders = {"clip": clip, "decoder": decoder, "stage1": root / "stage1", "stage2": root / "stage2"}
    return SimpleNamespace(root=root, world=world, flags=flags, folders=folders, **folders)


@pytest.fixture(scope="session")
def babbler(tiny):
    """A model whose answers are long and depend on question and image; after so few steps `tiny` answers nothing."""
    model, folder = load_model(tiny.stage2), tiny.root / "babbler"
    generator = torch.Generator().manual_seed(0)
    for part in (model.language_model, model.multi_modal_projector):
        for p in part.parameters():
            p.data.normal_(std=0.6, generator=generator)
    folder.mkdir()
    save_model(model, folder)
    Tokenizer.load(tiny.stage2).save(folder)
    return folder


@pytest.fixture(scope="session")
def server(babbler):
    """A running server of `babbler`. Its module is found because a test beside it asks for it."""
    from local_server import Server

    server = Server(babbler)
    yield server
    server.close()


@pytest.fixture(scope="session")
def world_images(tiny) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(tiny.world.glob("train-0/**/*.png"))[:6]]
