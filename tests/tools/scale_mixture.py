"""Measure time and memory with a mixture of the size of LLaVA-1.5's (665,298 records of ten sources).

    python tests/tools/scale_mixture.py --model DIR [--out /tmp/scale]

Writes the mixture with random words and one image of 64 pixels. Then measures, each in a new process and as train.py
does it: building the index, counting tokens, a second start up to the first batch, and the memory of 4 loader workers
over 200 batches. Takes minutes and 2 GB of disk. DIR holds a tokenizer.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from inputs import files

WORKERS, BATCH = 4, 16
SHORT = "Answer the question using a single word or phrase."
REGION = "Provide a short description for this region."
# Records, questions each and words of an answer. How many records of which source: Liu et al. 2023, LLaVA-1.5, table 7,
# and the released file. Questions and words are guesses that make a file of about the released one's 1 GB.
SOURCES = {
    "instruct": (157_712, 4, 60, ""),
    "sharegpt": (40_688, 3, 250, None),  # text only
    "vqav2": (82_783, 5, 1, SHORT),
    "gqa": (72_140, 13, 1, SHORT),
    "okvqa": (8_998, 1, 1, SHORT),
    "ocrvqa": (80_000, 5, 3, SHORT),
    "aokvqa": (66_160, 1, 1, "Answer with the option's letter from the given choices directly."),
    "textcaps": (21_953, 1, 12, "Provide a one-sentence caption for the provided image."),
    "refcoco": (48_447, 6, 6, REGION),
    "vg": (86_417, 10, 6, REGION),
}


def write_mixture(folder: Path):
    """Write mix.json, a shuffled mixture of all sources as published, and the image."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), (90, 120, 60)).save(folder / "images/one.png")
    kinds = [name for name, (count, *_) in SOURCES.items() for _ in range(count)]
    rng.shuffle(kinds)
    with (folder / "mix.json").open("w") as file:
        for number, kind in enumerate(tqdm(kinds, "writing", unit="record", unit_scale=True)):
            _, rounds, length, prompt = SOURCES[kind]
            messages = []
            for i in range(rng.randint(1, 2 * rounds - 1)):
                ask = " ".join(rng.choices(words, k=8)) + "?" + (f"\n{prompt}" if prompt and not i else "")
                answer = " ".join(rng.choices(words, k=rng.randint(1, 2 * length)))
                ask = "<image>\n" + ask if prompt is not None and not i else ask
                messages += [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
            record = {"id": f"{kind}-{number}"} | ({} if prompt is None else {"image": "one.png"})
            file.write(("[" if not number else ",\n") + json.dumps(record | {"conversations": messages}))
        file.write("]\n")


def memory(process: int | str) -> dict[str, int]:
    """Megabytes of a process: resident, with a share of shared pages (pss), and private."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"rss": kilobytes["Rss"] // 1024, "pss": kilobytes["Pss"] // 1024, "private": private // 1024}


def start(folder: Path, model: Path, workers: int, context: str | None, steps: int) -> dict:
    """Load data as train.py does, up to batch `steps`, in this process; returns seconds and megabytes."""
    import torch
    from torch.utils.data import DataLoader

    from clip import CLIPVisionConfig
    from data import Records, collate
    from inputs.mixture import batches, make_order, open_sources
    from inputs.tokenizer import Tokenizer
    from llava import LlavaConfig, TextConfig

    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(model)
    tokenizer.roles.setdefault("image", "<image>")
    tokenizer.add_special(tokenizer.roles["image"])
    config = LlavaConfig(TextConfig(), CLIPVisionConfig(image_size=336, patch_size=14), template="vicuna_v1")
    result, begin = {"before": memory("self")}, time.perf_counter()
    sources = open_sources([str(folder / "mix.json")], [str(folder / "images")])
    result["index_s"] = time.perf_counter() - begin
    dataset = Records(sources, tokenizer, config, 2048)
    lengths = dataset.lengths()
    result["lengths_s"] = time.perf_counter() - begin - result["index_s"]
    result["tokens"], result["records"] = int(np.abs(lengths).sum()), len(dataset)
    total = 5197 * 128
    order = batches(
        make_order(dataset.sizes, [1.0], 0, total, "proportional", "", 1), 128, 0, 0, 5197, 0, 8, 1, lengths
    )
    loader = DataLoader(
        dataset, batch_sampler=islice(order, steps + 1), collate_fn=partial(collate, pad_id=0), num_workers=workers,
        multiprocessing_context=context,
    )  # fmt: skip
    loader = iter(loader)
    for step, _ in zip(range(steps), loader):  # and not to its end, where the workers are gone
        if step == 0:
            result["first_batch_s"] = time.perf_counter() - begin
    result["main"] = memory("self")
    result["workers"] = [memory(worker.pid) for worker in loader._workers] if workers else []
    list(loader)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--out", type=Path, default=Path("/tmp/scale"), help="folder for the mixture and its index")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    files.OUTPUT_ROOT = args.out / "out"
    if args.step:
        workers, context, steps = args.step
        found = start(args.out, args.model, int(workers), None if context == "-" else context, int(steps))
        print(json.dumps(found))
        return
    if not (args.out / "mix.json").exists():
        write_mixture(args.out)
    print(f"{(args.out / 'mix.json').stat().st_size / 1e9:.2f} GB")
    shutil.rmtree(args.out / "out", ignore_errors=True)

    def measure(name: str, *step) -> dict:
        options = ["-W", "ignore"]  # torch warns of more workers than cores
        command = [sys.executable, *options, __file__, "--model", args.model, "--out", args.out, "--step", *step]
        done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{name}: {found['records']:,} records, {found['tokens']:,} tokens")
        for key in ("index_s", "lengths_s", "first_batch_s"):
            print(f"  {key:<14}{found[key]:8.1f}")
        for title, sizes in [("before data", found["before"]), ("main", found["main"])] + [
            (f"worker {i}", sizes) for i, sizes in enumerate(found["workers"])
        ]:
            print(f"  {title:<14}" + "  ".join(f"{key} {value:5} MB" for key, value in sizes.items()))
        return found

    measure("first start", 0, "-", 1)
    measure("second start", 0, "-", 1)
    measure(f"second start, {WORKERS} workers forked", WORKERS, "fork", 200)
    measure(f"second start, {WORKERS} workers spawned", WORKERS, "spawn", 200)


if __name__ == "__main__":
    main()
