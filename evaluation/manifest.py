"""The manifest of a file of answers: everything the answers depend on. A run is resumed only if it is the same."""

import json
import platform
from hashlib import sha256
from pathlib import Path

import numpy
import PIL
import torch

from evaluation.answering import image_names, part_files, sibling_file
from inputs.files import fingerprint, read_json, write_json
from inputs.images import BadImage, check_file, resolve_inside
from inputs.records import MARKER, DataError
from inputs.templates import TEMPLATES
from llava import Llava

MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.model", "tokenizer*.json", "vocab*")
MODEL_FILES += ("merges.txt", "added_tokens.json", "special_tokens_map.json", "generation_config.json", "*.gguf")
# The code that turns a question into an answer. Rooms are listed whole: a new file in one of them is covered.
CODE_FILES = ("clip.py", "llava.py", "lora.py", "data.py", "evaluation/answering.py")
CODE_FILES += ("inputs/*.py", "variants/*.py", "formats/*.py", "fast/*.py")
EXPLAINED = {  # keys of a manifest, in messages
    "pictures_sha256": "pictures_sha256 (names and sizes of the images)",
    "questions": "questions (content of the input file)",
    "code_sha256": "code_sha256 (this project's code)",
}


def hash_code(root: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of names and contents of all CODE_FILES."""
    paths = sorted(path.relative_to(root) for pattern in CODE_FILES for path in root.glob(pattern))
    return sha256(b"".join(f"{path.as_posix()}\n".encode() + (root / path).read_bytes() for path in paths)).hexdigest()


def hash_files(paths: list[Path]) -> list[str]:
    """SHA-256 and name of every file; for a folder, of its text files."""
    files = [file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    return [f"{fingerprint(file)['sha256']} {file.name}" for file in files]


def hash_images(questions: list[dict], images: Path, skip_bad: bool = False) -> str:
    """A hash of names and sizes in bytes of the images (to hash the content of 80,000 would take minutes). Raises
    DataError if an image is missing: before the first answer, not after hours. With skip_bad it has no size instead."""
    faults, sizes = [], {}
    for key, name in ((question["question_id"], name) for question in questions for name in image_names(question)):
        try:
            path = resolve_inside(images, name)
            check_file(path)
            sizes[name] = path.stat().st_size
        except BadImage as error:
            sizes[name] = None
            faults.append(f"question {key}: {error}")
    if faults and not skip_bad:
        raise DataError(faults[0] + (f" (and {len(faults) - 1:,} more images cannot be read)" if faults[1:] else ""))
    return sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()


def save_manifest(
    out: Path,
    folders: list[Path],
    files: list[Path],
    questions: list[dict],
    images: Path,
    model: Llava,
    settings: dict,
    skip_bad: bool = False,
):
    """Write the manifest beside `out`: no times and no paths, so that two equal runs write equal bytes.

    Args: folders: of the model and of its adapter; files: of the questions; settings: values of the command line;
    skip_bad: allow missing images.
    Raises DataError if `out` has answers that were made with another manifest.
    """
    config, device, template = model.config, model.device, TEMPLATES[model.config.template]
    markers = MARKER * len(image_names(questions[0])) if MARKER not in questions[0]["text"] else ""
    image_marker = markers and markers + "\n"
    found = [{path for name in MODEL_FILES for path in folder.glob(name)} for folder in folders]
    found = [{folder} if folder.is_file() else paths for folder, paths in zip(folders, found)]
    model_files = [(folder, sorted(paths)) for folder, paths in zip(folders, found)]
    values = settings | {
        "prompt": f"{template.first}{image_marker}{questions[0]['text']}{template.assistant}",  # the first one
        "pictures_sha256": hash_images(questions, images, skip_bad),
        "model": [{"name": folder.name, "files": hash_files(paths)} for folder, paths in model_files],
        "questions": hash_files(files),
        "template": config.template,
        "template_sha256": sha256(repr(template).encode()).hexdigest(),
        "image_mode": "anyres" if config.image_grid_pinpoints else config.image_mode,
        "decoding": "greedy",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, numpy, PIL)},
        "code_sha256": hash_code(),
    }
    path = sibling_file(out, "manifest.json")
    if out.exists() or part_files(out):
        if not path.exists():
            raise DataError(f"{out}: no {path.name} says how these answers were made: remove it, or name another --out")
        old = read_json(path)
        for key in sorted(old.keys() | values.keys()):
            if old.get(key) != values.get(key):
                reason = f"{out} was started with another {EXPLAINED.get(key, key)}, see {path}"
                raise DataError(f"{reason}: remove both, or name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
