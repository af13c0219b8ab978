"""Real photographs of any size and shape: train all stages until a few captions are memorized, then ask for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
PHOTOS = DATA / "coco-photos"


def script(*command: object) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no photographs in {PHOTOS} (LLAVA_DATA names the folder)")
def test_captions_of_photographs_are_memorized(tmp_path):
    photos = json.loads((PHOTOS / "photos.json").read_text())[:6]
    question = {"from": "human", "value": "<image>\nDescribe the image."}
    records = [
        {"id": p["id"], "image": p["image"], "conversations": [question, {"from": "gpt", "value": p["captions"][0]}]}
        for p in photos
    ]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    data = ["--data", tmp_path / "captions.json", "--images", PHOTOS / "images", "--batch-size", 6]
    towers = ["--vision", tmp_path / "0/clip", "--llm", tmp_path / "0/decoder"]
    script("train.py", "--stage", 0, "--size", "tiny", "--steps", 30, *data, "--out", tmp_path / "0")
    script("train.py", "--stage", 1, "--steps", 40, *data, *towers, "--out", tmp_path / "1")
    script("train.py", "--stage", 2, "--steps", 150, *data, "--model", tmp_path / "1", "--out", tmp_path / "2")
    for photo in photos[:3]:
        answer = script("sample.py", "--model", tmp_path / "2", "--image", PHOTOS / "images" / photo["image"])
        assert answer.strip() == photo["captions"][0]
