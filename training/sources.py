"""Find a run's data, and check it before any work starts."""

from pathlib import Path

import numpy as np

from data import Records
from inputs.check import Skips, count_cut, image_faults, log_skipped, refuse_bad
from inputs.files import fingerprint
from inputs.index import RecordFile
from inputs.mixture import Source, check_mixing, make_order, open_sources
from inputs.records import DataError
from inputs.samples import Samples
from inputs.templates import TEMPLATES
from training.ranks import Distributed
from training.runs import Run


def open_data(args, ranks: Distributed, default: Path | None, group: int) -> tuple[list[Source], list[Source]]:
    """Open and return the files to train on, and those to validate on.

    Args: default: file to train on without --data; group: neighboring records that stay in one batch. Raises ValueError
    on an impossible mixture, more bad records than --skip-bad allows, or any bad record of the validation data.
    """
    files, val_files = args.data or [], args.val or []
    opened = open_sources([*files, *val_files], args.images, args.follow_links)
    sources, val_sources = opened[: len(files)], opened[len(files) :]
    sources = sources or open_sources([str(default)], None, args.follow_links)
    for source in (source for source in (*sources, *val_sources) if source.file.unread):
        ranks.print0(f"{source.file.path}: keys that are not read: {source.file.unread}")
    if args.skip_bad:  # rank 0 opens every image, so that all ranks leave out the same records
        found = ranks.broadcast([image_faults(source) for source in sources] if ranks.is_main else None)
        for source, faults in zip(sources, found):
            source.faults |= faults
    refuse_bad(sources, args.skip_bad)
    refuse_bad(val_sources, 0)
    check_mixing([source.weight for source in sources], args.mixing, args.shares, group)
    count = sum(len(source.usable()) for source in sources)
    if count < ranks.world_size:
        raise ValueError(f"--data: {count} records for {ranks.world_size} ranks")
    if files and args.world:
        ranks.print0("--world is not read: --data names the files")
    return sources, val_sources


def skip_bad_samples(args, ranks: Distributed, run: Run, dataset: Samples):
    """With --skip-bad: list the records left out in the run's folder, and let `dataset` replace bad samples."""
    if not args.skip_bad:
        return
    faults = [fault for source in dataset.sources for fault in source.faults.values()]
    path = run.folder / "skipped.jsonl"
    ranks.on_main(log_skipped, path, faults)  # the file is there before any rank adds to it
    ranks.print0(f"--skip-bad: {len(faults):,} records are left out; {path} names them and those that turn out bad")
    dataset.skips = Skips(args.skip_bad, len(dataset), path)


def count_lone_questions(dataset: Records) -> int:
    """Number of records with a question that a plain template drops; 0 for another template."""
    if not TEMPLATES[dataset.template].plain or dataset.text_only:
        return 0
    parts, most = [(source.file, source.usable()) for source in dataset.sources], dataset.questions or 2**31 - 1
    alone = (((file.rounds[part] - 1) % most == 0) & (file.image_counts[part] > 0) for file, part in parts)
    return sum(int(lone.sum()) for lone in alone)


def report_shares(args, ranks: Distributed, dataset: Samples):
    """With --shares or --mixing, say how often each file is read, and how much of it never is."""
    if not args.shares and args.mixing == "proportional":
        return
    total, weights = args.steps * args.batch_size, [source.weight for source in dataset.sources]
    order = make_order(dataset.sizes, weights, args.seed, total, args.mixing, args.shares, 1)(0, total)
    borders = np.cumsum([0, *dataset.sizes])
    for source, first, last in zip(dataset.sources, borders, borders[1:]):
        drawn, size = order[(first <= order) & (order < last)], last - first
        unread = f"{size - len(np.unique(drawn)):,} of its {size:,} samples never"
        ranks.print0(f"{source.file.path} is read {len(drawn) / size:.3g} times, {unread}")


def hash_file(file: RecordFile) -> str:
    """The SHA-256 of a file of records; of a large one, it is kept beside the index."""
    return str(file.cached("sha256", [], lambda: np.array(fingerprint(file.path)["sha256"])))


def report_cut(ranks: Distributed, run: Run, dataset: Samples, val: Samples | None):
    """Print what is cut off or left out of the data, and keep the counts of `dataset` for run.json.

    Raises DataError, without --skip-bad, if a sample has no room for an answer.
    """
    for part in filter(None, (dataset, val)):
        counts, text = ranks.on_main(count_cut, part)
        if counts["unanswered"] and not part.skips:
            raise DataError(text)
        if text:
            ranks.print0(f"{'validation: ' if part is val else ''}{text}")
        if part is dataset:
            run.values["lengths"] = counts
    run.values["data_sha256"] = sums = ranks.on_main(lambda: [hash_file(source.file) for source in dataset.sources])
    run.check_unchanged("data_sha256", sums, "files whose sha256 are")
    if isinstance(dataset, Records) and (count := count_lone_questions(dataset)):
        text = "records of an image and one question are read without their question, as in LLaVA's stage 1"
        ranks.print0(f"template {dataset.template}: {count:,} {text}")
    if dataset.left_out:
        ranks.print0(f"{dataset.left_out:,} records do not have exactly one image: they are left out")
    if dataset.config.vision_config and not any(source.file.distinct_images for source in dataset.sources):
        ranks.print0("no record has an image: nothing is learned about images")
