"""Build a training run again from its folder: the model it started with, its data in their order, its weights now."""

import os
import re
from argparse import Namespace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from data import CaptionPairs, Records, collate
from formats.adapters import Adapter, is_adapter, read_adapter
from formats.weights import choose_template, load_checkpoint, load_clip, load_model
from inputs.check import Skips, image_faults
from inputs.files import OUTPUT_ROOT, read_json
from inputs.mixture import Source, batches, make_order, open_sources
from inputs.records import image_paths
from inputs.samples import Samples
from inputs.tokenizer import Tokenizer
from lora import add_lora
from training.checkpoint import restore_checkpoint
from training.flags import PARSER
from training.objectives import LOG_VARIANCES
from training.plots import read_log
from training.towers import Contrastive, assemble, new_clip, new_decoder, whiten_patches, whiten_projector
from variants.relevance import train_relevance
from variants.tuning import TRAINED, add_tuning
from world.scenes import GROUP_SIZE

# Parts by the beginning of a parameter's name, in the order in which a step runs them, and what --train calls them.
PARTS = {"clip.vision_model": "vision tower", "clip.text_model": "text tower", "clip": "end of CLIP"}
PARTS |= {"vision_tower": "vision tower", "multi_modal_projector": "projector", "image_newline": "projector"}
PARTS |= {"language_model": "decoder", "relevance": "relevance", LOG_VARIANCES: "weights of tasks"}
FLAGS = {"vision tower": "vision", "projector": "projector", "decoder": "llm", "relevance": "relevance"}


def part_of(name: str) -> str:
    """Return the part that a parameter or a layer belongs to."""
    return next(part for prefix, part in PARTS.items() if name.startswith(prefix))


def layer_of(name: str) -> str:
    """Return the layer of a parameter, or of the path of a layer: "decoder layer 3", "projector linear_1"."""
    inner = re.search(r"layers\.(\d+)", name)
    own = f"layer {inner[1]}" if inner else re.sub(r"\.(weight|bias)$", "", name).split(".")[-1]
    return f"{part_of(name)} {own}"


def should_train(args: Namespace, model: nn.Module, name: str) -> bool:
    """Return whether a parameter trains with these flags. Of a vision tower, only the blocks that are used do."""
    if args.stage == 0 or ".lora_" in name or TRAINED.search(name) or name == LOG_VARIANCES:
        return True
    if FLAGS[part_of(name)] not in args.train or "post_layernorm" in name:
        return False
    block = re.match(r"vision_tower.*\.layers\.(\d+)", name)
    tower = model.vision_tower.vision_model
    return not block or int(block[1]) < len(tower.blocks(model.config.vision_feature_layer))


# ---------------------------------------------------------------------------------------------------------------------
# model and data as they were before the first step, as train.py builds them


def open_files(args: Namespace, kind: str) -> list[Source]:
    """Return the files that a run trains on. Args: kind: the embedded world's file, which is used without --data."""
    files = args.data or [str(Path(args.world or OUTPUT_ROOT / "world") / f"{kind}.json")]
    named, folders = ([*files, *(args.val or [])], args.images) if args.data else (files, None)
    sources = open_sources(named, folders, args.follow_links)[: len(files)]
    for source in sources if args.skip_bad else ():
        source.faults |= image_faults(source)
    return sources


def build_tower(args: Namespace, folder: Path, part: str) -> tuple[nn.Module, Tokenizer, Samples]:
    """Return a tower of stage 0, its tokenizer and its dataset. Both towers have one vocabulary."""
    finished = [path for path in (folder, *folder.parent.iterdir()) if (path / "tokenizer.json").exists()]
    if not finished:
        raise ValueError(f"{folder}: stage 0 keeps its vocabulary from the end of a tower's training on: wait for it")
    tokenizer = Tokenizer.load(finished[0])
    torch.manual_seed(args.seed)
    if part == "decoder":
        model, options = new_decoder(args.size, tokenizer, args.template or "llava_hf"), {"text_only": True}
        files, options["questions"] = open_files(args, "text"), args.questions
        return model, tokenizer, Records(files, tokenizer, model.config, args.max_length or 1024, **options)
    clip = new_clip(args.size, args.patch_size, tokenizer.vocab_size)
    dataset = CaptionPairs(open_files(args, "captions"), tokenizer, clip.config, args.image_mode or "pad")
    whiten_patches(clip, dataset)
    return Contrastive(clip), tokenizer, dataset


def build_llava(args: Namespace) -> tuple[nn.Module, Tokenizer, Samples]:
    """Return the LLaVA of stage 1 or 2, its tokenizer and its dataset."""
    if args.vision:
        kind = args.projector or "mlp2x_gelu", args.seed, args.visual_tokens
        model, tokenizer = assemble(Path(args.vision), Path(args.llm), *kind)
    else:
        model, tokenizer = load_checkpoint(Path(args.model), "cpu", torch.float32, bits=args.bits)
    config = model.config
    config.image_mode = args.image_mode or config.image_mode
    if args.stage == 2:
        choose_template(config, tokenizer, args.template)
    if args.relevance:
        torch.manual_seed(args.seed)
        train_relevance(model, args.relevance, args.token_price)
    if args.lora:
        torch.manual_seed(args.seed)
        ranks = {"llm": args.lora_rank, "vision": args.lora_rank_vision}
        ranks = {tower: rank for tower, rank in ranks.items() if args.lora in (tower, "both")}
        add_lora(model, ranks, args.lora_alpha, args.lora_dropout, args.lora_layers, args.dora)
    if args.tune:
        torch.manual_seed(args.seed)
        add_tuning(model, args.tune, args.prefix_length, args.tune_width)
    for name, p in model.named_parameters():
        p.requires_grad_(should_train(args, model, name))
    options = {"image_order": args.image_order, "seed": args.seed, "questions": args.questions}
    options |= {"template": args.template or config.template}
    files = open_files(args, "captions" if args.stage == 1 else "instruct")
    dataset = Records(
        files, tokenizer, config, args.max_length or config.text_config.max_position_embeddings, **options
    )
    if args.vision and args.whiten and dataset.images(1):
        whiten_projector(model, dataset)
    if args.init_from:
        restore_checkpoint(Path(args.init_from), model)
    return model, tokenizer, dataset


def adapter_weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by the names of our parameters."""
    named = dict(adapter.replaced)
    for path, (a, b, _, lengths) in adapter.lora.items():
        named |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        named |= {} if lengths is None else {f"{path}.lora_magnitude_vector": lengths}
    for path, tensors in adapter.tuning.parts.items() if adapter.tuning else ():
        named |= {f"{path}.{name}": p.flatten() if name == "ia3_l" else p for name, p in tensors.items()}
    return named


# ---------------------------------------------------------------------------------------------------------------------
# the run


class Lengths:
    """dataset.lengths(), counted only for the samples that are asked for."""

    def __init__(self, dataset: Records):
        self.most, self.length = dataset.max_length, lru_cache(4096)(dataset.length)

    def __getitem__(self, samples: np.ndarray) -> np.ndarray:
        return np.clip([self.length(i) for i in samples.tolist()], -self.most, self.most)


class TrainedRun:
    """A run, built again from its folder.

    Attributes: args: its flags; rows: of its log; part: "clip", "decoder" or "llava"; model: in eval mode, as training
    started, until load_trained(); changes: by parameter, its root mean square at the start, and that of its change.
    Raises ValueError, also if the weights or the data that the run started from are gone.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        if not (folder / "run.json").exists():
            inner = " or ".join(str(path.parent) for path in sorted(folder.glob("*/run.json")))
            raise ValueError(f"{folder}: no run.json, so this is no run{f'; name {inner}' if inner else ''}")
        values, self.rows = read_json(folder / "run.json"), read_log(folder)
        self.args = PARSER.parse_args(
            ["--stage", str(values["stage"])], Namespace(**values)
        )  # adds newer flags' defaults
        if not self.rows:
            raise ValueError(f"{folder}: no step is logged yet")
        args, self.folder, self.changes, self.note = self.args, folder.resolve(), {}, ""
        self.part, self.ranks, self.steps = self.folder.name, getattr(args, "ranks", 1), self.rows[-1]["step"]
        if args.stage:
            self.part, built = "llava", build_llava(args)
        else:
            built = build_tower(args, self.folder, self.part)
        self.model, self.tokenizer, self.dataset = built
        self.model.eval().to(device)
        self.device = device
        dataset, self.group = self.dataset, GROUP_SIZE if self.part == "clip" else 1
        if args.skip_bad:
            dataset.skips = Skips(args.skip_bad, len(dataset), Path(os.devnull))
        weights, total = [source.weight for source in dataset.sources], args.steps * args.batch_size
        self.order = make_order(dataset.sizes, weights, args.seed, total, args.mixing, args.shares, self.group)
        self.lengths = Lengths(dataset) if isinstance(dataset, Records) else None
        files = [source.file for source in dataset.sources]
        self.sample = lru_cache(128)(dataset.__getitem__)
        self.has_images = self.part != "decoder" and any(file.distinct_images for file in files)

    def samples(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Return the samples that a rank reads in a step; the first step is 0."""
        place = step, self.args.steps, rank, ranks, self.group, self.lengths
        return next(batches(self.order, self.args.batch_size, self.args.seed, *place))

    @cached_property
    def probe(self) -> list[int]:
        """Up to 64 samples that the run has read, most of them with images."""
        read = dict.fromkeys(i for step in range(min(self.steps, 64)) for i in self.samples(step))
        seen = [i for i in read if self.has_images and image_paths(self.dataset.record(i))][:48]
        return (seen + [i for i in read if i not in seen])[:64]

    def batch(self, samples: list[int]) -> dict:
        batch = collate([self.sample(i) for i in samples], self.tokenizer.pad_id)
        return {key: v.to(self.device) if torch.is_tensor(v) else v for key, v in batch.items()}

    def micro_batches(self, step: int, samples: list[list[int]] | None = None) -> list[dict]:
        """Return the micro-batches of a step, each over all ranks. Args: samples: of each rank, default the order's."""
        samples = samples or [self.samples(step, rank, self.ranks) for rank in range(self.ranks)]
        size = len(samples[0]) // self.args.accumulate
        starts = range(0, size * self.args.accumulate, size)
        return [self.batch([i for own in samples for i in own[start : start + size]]) for start in starts]

    @torch.no_grad()
    def load_trained(self):
        """Give the model the weights that the run has now, and fill `changes`."""
        weights = self.trained_weights()
        for name, p in self.model.named_parameters():
            if name in weights and p.is_floating_point():
                new = weights[name].to(p)
                self.changes[name] = tuple(float(x.float().square().mean().sqrt()) for x in (p, new - p))
                p.copy_(new)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights by our names: of the finished model, else those that the newest checkpoint holds."""
        if not hasattr(self.args, "finished"):
            if not (self.folder / "latest").exists():
                raise ValueError(f"{self.folder}: the run is not finished, and has no checkpoint yet")
            return load_file(self.folder / "latest" / "trained.safetensors")
        if is_adapter(self.folder):
            if self.args.tune in ("p-tuning", "prefix-mlp"):
                reason = f"the files of {self.args.tune} hold what its MLP makes, not the MLP that trained"
                raise ValueError(f"{self.folder}: {reason}: only a run that is not finished can be compared")
            return adapter_weights(read_adapter(self.folder))
        clip = self.part == "clip"
        model = load_clip(self.folder) if clip else load_model(self.folder)
        return {"clip." * clip + name: p.detach() for name, p in model.named_parameters()}
