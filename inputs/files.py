"""Writing so that a kill leaves the old or the new, never half; and reading what is not to be trusted.

Whatever is published appears whole or not at all: it is written beside its place, flushed to the disk, then renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

OUTPUT_ROOT = Path("out")  # of everything that is written without a name given

# ---------------------------------------------------------------------------------------------------------------------
# folders


def publish_folder(folder: Path, write: Callable[[Path], None]):
    """Make `folder` appear whole: `write` fills a folder beside it, which is flushed and then takes the name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir()
    try:
        write(partial)
    except (ValueError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in [*partial.iterdir(), partial]:
        fsync(path)
    partial.rename(folder)
    fsync(folder.parent)


def write_atomic(path: Path, content: bytes):
    """Replace a file in one step; a reader sees the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    fsync(partial)
    os.replace(partial, path)


def read_complete_lines(path: Path) -> bytes:
    """What a growing file holds up to its last line break: a kill may have cut the line that follows."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


MANIFEST = "manifest.json"


def write_manifest(folder: Path):
    """Note size and SHA-256 of every file in the folder, so that `verify_manifest` can tell any later change."""
    write_json(folder / MANIFEST, {path.name: fingerprint(path) for path in sorted(folder.iterdir())})


def fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify_manifest(folder: Path):
    """Raises ValueError naming the first file that is not as its manifest says."""
    manifest, text = read_json(folder / MANIFEST), (folder / MANIFEST).read_text()
    if text != to_json(manifest):  # a change in its own spaces would go unseen otherwise
        raise ValueError(f"{folder / MANIFEST}: was changed")
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(names ^ set(manifest)):
        raise ValueError(f"{folder / name}: {'is not in the manifest' if name in names else 'is missing'}")
    for name, expected in manifest.items():
        if fingerprint(folder / name) != expected:
            raise ValueError(f"{folder / name}: is not as it was written")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: dict):
    """Replace a JSON file in one step."""
    write_atomic(path, to_json(values).encode())


def reject_duplicate_keys(pairs: list) -> dict:
    """For json.loads, as object_pairs_hook. Raises ValueError if an object names a key twice."""
    result = dict(pairs)
    if len(result) < len(pairs):  # Python would keep the last one: what was checked is not what is used
        raise ValueError(f"key given twice among {[key for key, _ in pairs][:6]}")
    return result


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicate_keys)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# tensors

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], values: Iterator[torch.Tensor]):
    """A safetensors file, tensor by tensor, so that of a model spread over ranks only one is ever whole.

    Args: tensors: whose shapes and types are written first; values: what they hold, in the same order.
    The format: the header's length (8 bytes, little-endian), the header (JSON), then the data end to end.
    """
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in zip(tensors, values):
            file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
