"""Write files so that a kill leaves the old or the new version, never half of one; read untrusted JSON safely.

Everything is written under a temporary name, flushed to disk, and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

OUTPUT_ROOT = Path("out")  # the folder for output without an --out
MANIFEST = "manifest.json"


def publish_folder(folder: Path, write: Callable[[Path], None]):
    """Make a complete folder appear: `write` fills a temporary folder beside it, which is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed here
    partial.mkdir()
    try:
        write(partial)
        for path in [*partial.iterdir(), partial]:
            if path.is_file():  # as the umask wants it; safetensors writes files that only their owner can read
                path.chmod(partial.stat().st_mode & 0o666)
            fsync(path)
    except (ValueError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)
    fsync(folder.parent)


def write_atomic(path: Path, content: bytes):
    """Replace a file in one step: a reader sees the old or the new content."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    fsync(partial)
    os.replace(partial, path)


def read_complete_lines(path: Path) -> bytes:
    """A log's content up to its last line break, as a kill may have cut the last line; b"" if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_manifest(folder: Path):
    """Record size and SHA-256 of every file in the folder, for `verify_manifest`."""
    write_json(folder / MANIFEST, {path.name: fingerprint(path) for path in sorted(folder.iterdir())})


def fingerprint(path: Path) -> dict:
    """{"bytes": size, "sha256": hex digest} of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify_manifest(folder: Path):
    """Raise ValueError that names the first file that differs from the manifest, is missing, or is not in it."""
    manifest, text = read_json(folder / MANIFEST), (folder / MANIFEST).read_text()
    if text != to_json(manifest):  # finds changes in its whitespace, too
        raise ValueError(f"{folder / MANIFEST}: was changed after it was written")
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(names ^ set(manifest)):
        raise ValueError(f"{folder / name}: {'is not in the manifest' if name in names else 'is missing'}")
    for name, expected in manifest.items():
        if fingerprint(folder / name) != expected:
            raise ValueError(f"{folder / name}: was changed after it was written")


def to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: dict):
    """Replace a JSON file in one step."""
    write_atomic(path, to_json(values).encode())


def reject_duplicate_keys(pairs: list) -> dict:
    """An object_pairs_hook for json. Raises ValueError if an object has a key twice, which Python allows."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"duplicate key among {[key for key, _ in pairs][:6]}")
    return result


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError that names the file if it cannot be read or is no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=reject_duplicate_keys)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def read_optional_json(path: Path) -> dict:
    """The same, or {} if there is no such file."""
    return read_json(path) if path.exists() else {}


CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], values: Iterator[torch.Tensor]):
    """Write a safetensors file tensor by tensor, so a model sharded over ranks is never whole in memory.

    The format: length of the header (8 bytes, little-endian), the header (JSON), then the data without gaps.

    Args: tensors: give names, shapes and dtypes. values: the data, in the same order.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in zip(tensors, values):
            file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
