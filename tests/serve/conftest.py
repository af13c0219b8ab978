"""A server with a model whose answers are long, and images of the embedded world."""

import pytest
from local_server import Server
from PIL import Image


@pytest.fixture(scope="session")
def server(babbler):
    server = Server(babbler)
    yield server
    server.close()


@pytest.fixture(scope="session")
def world_images(tiny) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(tiny.world.glob("train-0/**/*.png"))[:6]]
