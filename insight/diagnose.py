"""Find what is wrong with a training run: python -m insight RUN.

The run is built again from its records. A check returns a sentence for each fault that it finds, with the likely cause;
an empty list if all is well; None if it does not apply to the run. docs/diagnosis.md explains the sentences.
"""

import math
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from clip import CLIPEncoderLayer
from data import image_pixels, load_image
from inputs.images import open_image, resolve_inside
from inputs.records import image_paths, turns_of
from inputs.templates import MARKUP, TEMPLATES
from insight import measures
from insight.measures import count_labels, watch
from insight.rebuild import PARTS, TrainedRun, layer_of, part_of
from llava import IGNORE, DecoderLayer, Projector, generate
from training.plots import BLUE, draw_panels

RATE_LIMIT = 0.25  # share of its size by which a step may change a weight; LLaVA's recipes reach 0.11
LOOK_AFTER = 20_000  # samples after which a model should use its images; before, it is too early to tell
Findings = list[str] | None

# ---------------------------------------------------------------------------------------------------------------------
# the log, the data, and the model before its first step


def check_loss(run: TrainedRun) -> Findings:
    """The log: steps that were skipped, and a loss that ends above its start."""
    losses = [row["loss"] for row in run.rows if row["loss"] is not None]
    skipped, tenth = len(run.rows) - len(losses), max(3, len(losses) // 10)
    found = [f"loss: it was not finite in {skipped} steps"] if skipped else []
    if len(losses) >= 20 and (last := np.mean(losses[-tenth:])) > 1.1 * (first := np.mean(losses[:3])):
        found.append(f"loss: it rose from {first:.3g} to {last:.3g}")
    return [f"{text}. Likely cause: the learning rate is too high" for text in found]


def other_loss(args) -> bool:
    """Whether the logged loss is not the cross-entropy, also in the first step."""
    return bool(args.task_weights or args.distill)


def check_start(run: TrainedRun) -> Findings:
    """The first loss is at most near that of a uniform guess, and no layer starts with huge outputs."""
    choices = run.args.batch_size if run.part == "clip" else run.model.config.text_config.vocab_size
    first, found, scales = run.rows[0]["loss"] or math.inf, [], {}

    def record(path: str, x: torch.Tensor):
        scales[path] = x.float().square().mean(-1).sqrt().median().item()  # of the median token

    with torch.no_grad(), watch(run.model, (), (DecoderLayer, CLIPEncoderLayer, Projector), record):
        run.model(**run.batch(run.probe[:16]))
    if run.rows[0]["step"] == 1 and not other_loss(run.args) and first > 1.5 * math.log(choices) + 1:
        found = [f"the first loss is {first:.4g}, a uniform guess has {math.log(choices):.3g}"]
    found += [f"the outputs of {layer_of(path)} have the scale {x:.3g}" for path, x in scales.items() if not x < 1000]
    return [f"initialization: {' and '.join(found[:2])}. Likely cause: weights drawn too large"] if found else []


def step_loss(run: TrainedRun, step: int, samples: list[list[int]] | None = None) -> torch.Tensor:
    """Return the loss per token of a step. Args: samples: as in run.micro_batches."""
    batches = run.micro_batches(step, samples)
    return sum(run.model(**batch) for batch in batches) / sum(map(count_labels, batches))


@torch.enable_grad()
def first_updates(run: TrainedRun, trained: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return AdamW's first update of each parameter: the learning rate times the sign of the gradient."""
    args, rate = run.args, run.rows[0]["lr"] / run.args.lr
    peaks = {"vision_tower": args.lr_vision, "multi_modal_projector": args.lr_projector}
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(step_loss(run, 0), list(trained.values()), **options)
    norm = float(torch.nn.utils.get_total_norm(gradients))
    scale = min(1.0, args.clip_grad / (norm + 1e-6)) if args.clip_grad else 1.0
    rates = [rate * (peaks.get(name.split(".")[0]) or args.lr) for name in trained]
    rates = [rate * ((args.lora_plus or 1) if ".lora_B." in name else 1) for name, rate in zip(trained, rates)]
    return [rate * scale * g / (scale * g.abs() + 1e-8) for rate, g in zip(rates, gradients)]


@torch.no_grad()
def check_replay(run: TrainedRun) -> Findings:
    """The first two steps, computed again from the run's records, have the losses of the log; not with flags that
    change images, tokens or the loss from step to step."""
    args, ranks, logged = run.args, run.ranks, [row["loss"] for row in run.rows[:2]]
    changed = args.augment or args.nested_pool is not None or args.relevance or args.lora_images_only
    if changed or other_loss(args) or args.ewc or args.loss_mean != "token":
        return None
    if run.rows[0]["step"] != 1 or len(logged) < 2 or None in logged:
        return None
    exact = args.dtype == "float32" or (args.dtype == "auto" and getattr(args, "ran_on", "") == "cpu")
    dropout = bool(args.lora and args.lora_dropout)  # it is not repeated, and does nothing before LoRA's first update
    rough = not exact or (dropout and bool(args.init_from)), not exact or dropout

    def find(step: int, again: float, guesses: dict, otherwise: str) -> Findings:
        """Args: guesses: a loss by its cause."""
        off = {cause: abs(loss / logged[step] - 1) for cause, loss in guesses.items()}
        tolerance, best = 0.03 if rough[step] else 1e-4, min(off, key=off.get, default="")
        if abs(again / logged[step] - 1) <= tolerance:
            return []
        cause = best if best and off[best] <= tolerance else otherwise
        text = f"replay: step {step + 1} has the loss {logged[step]:.4g} in the log, {again:.4g} when computed again"
        return [f"{text}. Likely cause: {cause}"]

    same = [[run.samples(0, rank, ranks)] * ranks for rank in range(ranks) if ranks > 1]
    guesses = {f"all ranks read the data of rank {i}": float(step_loss(run, 0, own)) for i, own in enumerate(same)}
    otherwise = "other samples, images, labels or code than the records give now"
    if found := find(0, float(step_loss(run, 0)), guesses, otherwise):
        return found
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    start, updates, losses = [p.clone() for p in trained.values()], first_updates(run, trained), {}
    same = dict.fromkeys(map(part_of, trained), 1)
    cases = {f"a learning rate {k:g} times the logged one": dict.fromkeys(same, k) for k in (1, 0.01, 0.1, 10, 100)}
    cases |= {f"the {part} did not train": same | {part: 0} for part in same}
    cases["nothing trained"] = dict.fromkeys(same, 0)  # comes last: it restores the start
    for cause, factors in cases.items():
        for (name, p), old, update in zip(trained.items(), start, updates):
            p.copy_(old - factors[part_of(name)] * update)
        losses[cause] = float(step_loss(run, 1))
    again = losses.pop(next(iter(losses)))
    return find(1, again, losses, "step 1 trained other parts than the flags say, or at other rates")


def check_ranks(run: TrainedRun) -> Findings:
    """Every sample of a step goes to one rank. With one rank, it is checked as if there were two."""
    ranks = max(2, run.ranks)
    if run.args.batch_size % (ranks * run.group):
        return None
    for step in (0, run.steps - 1):
        read, whole = [i for rank in range(ranks) for i in run.samples(step, rank, ranks)], run.samples(step)
        if sorted(read) != sorted(whole):
            text = f"{ranks} ranks read {len(set(read))} of the {len(set(whole))} samples of step {step + 1}"
            return [f"ranks: {text}. Likely cause: one rank reads the data of another"]
    return []


def check_labels(run: TrainedRun) -> Findings:
    """The tokens that train are the answers of the records, and their ends."""
    if run.part == "clip" or run.dataset.skips:  # which replaces bad samples
        return None
    batch, dataset, wrong = run.batch(run.probe), run.dataset, []
    if found := measures.find_labels(batch):
        return found

    def squeeze(text: str) -> str:
        return "".join(text.split())

    for index, labels in zip(run.probe, batch["labels"].tolist()):
        record, trained = dataset.record(index), run.tokenizer.decode([i for i in labels if i != IGNORE])
        end = MARKUP.sub("", TEMPLATES[record.get("template", dataset.template)].end).strip()
        answers = "".join(run.tokenizer.decode(run.tokenizer.encode(turn.answer)) + end for turn in turns_of(record))
        found, wanted = squeeze(trained).rstrip("\ufffd"), squeeze(answers)  # a cut may split a letter
        if found != wanted and not (wanted.startswith(found) and len(labels) >= dataset.max_length):
            wrong.append(f"{dataset.where(index)} trains {trained[:30]!r}, its answer is {answers[:30]!r}")
    share = float((batch["labels"] != IGNORE).float().mean())
    text = f"labels: in {len(wrong)} of {len(run.probe)} samples they are not on the answers, {share:.0%} of all train"
    return [f"{text} ({wrong[0]}). Likely cause: the mask covers another role"] if wrong else []


def check_images(run: TrainedRun) -> Findings:
    """The samples of a batch have the pixels of the images that their records name."""
    if not run.has_images or run.dataset.skips:
        return None
    dataset, config, expected = run.dataset, run.dataset.config, []
    for index in run.probe:
        for name in image_paths(dataset.record(index)):
            folder = dataset.source(index).images
            if run.part == "clip":
                image = open_image(resolve_inside(folder, name))
                expected.append(image_pixels(image, config.vision_config.image_size, dataset.image_mode)[None])
            else:
                expected.append(load_image(folder, name, config).pixels)
    expected, found = torch.cat(expected), run.batch(run.probe)["pixel_values"].cpu()
    wrong = len(expected) if found.shape != expected.shape else int((found != expected).flatten(1).any(1).sum())
    text = f"images: {wrong} of {len(expected)} in a batch are not those that their records name"
    return [f"{text}. Likely cause: images and texts are in different orders"] if wrong else []


@torch.no_grad()
def check_loss_function(run: TrainedRun) -> Findings:
    """The loss of the model is the cross-entropy of the next token, over the tokens that train."""
    if run.part == "clip":
        return None
    batch, model = run.batch(run.probe[:2]), run.model
    features = None if batch["pixel_values"] is None else model.vision_features(batch["pixel_values"])
    x = model.embed(batch["input_ids"], features, batch["image_sizes"])
    logits, labels = model.language_model.lm_head(model.language_model.model(x)).float(), batch["labels"]
    loss = float(model(**batch)) / count_labels(batch)
    ahead = [logits[:, : logits.shape[1] - k].flatten(0, 1) for k in range(3)]  # to predict the label k places ahead
    losses = [float(F.cross_entropy(ahead[k], labels[:, k:].flatten())) for k in range(3)]
    if abs(loss - losses[1]) < 1e-3 * loss:
        return []
    text = f"loss function: it gives {loss:.4g}, the cross-entropy of the next token is {losses[1]:.4g}"
    near = [f", of the token {k} places ahead {losses[k]:.4g}" for k in (0, 2) if abs(loss - losses[k]) < 0.05 * loss]
    return [f"{text}{''.join(near)}. Likely cause: labels are shifted by one place too few or too many"]


# ---------------------------------------------------------------------------------------------------------------------
# the model as it is now


def check_training(run: TrainedRun) -> Findings:
    """The parts that should train have changed since the start, and no others."""
    largest, found = {}, []
    for name, p in run.model.named_parameters():
        if p.is_floating_point():
            key = part_of(name), p.requires_grad
            largest[key] = max(largest.get(key, 0), run.changes.get(name, (0, 0))[1])
    for (part, trains), change in largest.items():
        if trains and not change and (run.has_images or part == "decoder"):
            text = f"{part}: {run.steps} steps have not changed it, though the flags say that it trains"
            found.append(f"{text}. Likely cause: it is frozen, not in the optimizer, or without a gradient")
        if change and not trains:
            found.append(f"{part}: weights that should be frozen have changed. Likely cause: requires_grad is True")
    return found


def check_rate(run: TrainedRun) -> Findings:
    """A step changes a weight by a small share of its size; AdamW changes it by about the learning rate."""
    args, shares = run.args, {}
    peak, rates = max(row["lr"] for row in run.rows) / args.lr, {"vision tower": args.lr_vision}
    rates["projector"] = args.lr_projector
    for name, p in run.model.named_parameters():
        size, _ = run.changes.get(name, (0, 0))
        if p.requires_grad and p.ndim >= 2 and size:
            shares.setdefault(part_of(name), []).append(peak * (rates.get(part_of(name)) or args.lr) / size)
    high = {part: share for part, values in shares.items() if (share := np.median(values)) > RATE_LIMIT}
    text = ", ".join(f"a weight of the {part} by {share:.0%}" for part, share in high.items())
    text = f"learning rate: a step at the peak changes {text} of its size, and {RATE_LIMIT:.0%} is too much"
    return [f"{text}. Likely cause: a rate that is 10 or 100 times too high"] if high else []


def check_gradients(run: TrainedRun) -> Findings:
    """A gradient reaches every layer that trains. `run.norms` keeps the norms."""
    run.norms = measures.gradient_norms(run.model, run.batch(run.probe[:16]))
    return measures.find_gradients(run.norms, run.has_images)


def check_units(run: TrainedRun) -> Findings:
    """In no layer are many units always off."""
    return measures.find_dead(run.model, run.batch(run.probe[::2]))


def check_looking(run: TrainedRun) -> Findings:
    """The loss is lower with a sample's own image than with another's. `run.note`: it is too early to tell."""
    paths = {i: image_paths(run.dataset.record(i)) for i in run.probe} if run.has_images else {}
    seen, gains = [i for i in paths if paths[i]], []
    for one, two in zip(seen[::2], seen[1::2]):
        if len(paths[one]) == len(paths[two]):
            tiles = len(run.batch([one])["pixel_values"])
            gains.append(measures.image_gain(run.model, run.batch([one, two]), tiles, len(paths[one])))
    gains = np.array([gain for gain in gains if gain is not None])
    if len(gains) < 4:
        return None
    mean, error, samples = gains.mean(), gains.std() / len(gains) ** 0.5, run.steps * run.args.batch_size
    text = f"the loss grows by {mean:.2g} +- {error:.1g} with the images of other samples"
    if abs(gains).max() < 1e-6:
        return [measures.BLIND]
    if mean <= 2 * error and samples > LOOK_AFTER and run.steps >= run.args.steps / 2:
        return [f"images: after {samples:,} samples {text}. Likely cause: images and texts do not belong together"]
    run.note = f"; too early to tell whether it looks at images: {text}" if mean <= 2 * error else ""
    return []


@torch.no_grad()
def check_cache(run: TrainedRun) -> Findings:
    """Greedy decoding of two prompts with the cache has the states of one pass over each whole text."""
    if run.part == "clip":
        return None
    model, config, states, prompts, images = run.model, run.model.config, [], [], []
    for index in run.probe:
        batch = run.batch([index])
        ids, end = batch["input_ids"][0].tolist(), max(1, int((batch["labels"][0] != IGNORE).int().argmax()))
        fits = config.image_token_index not in ids[end:] and end + 8 <= config.text_config.max_position_embeddings
        if fits and len(prompts) < 2:
            prompts.append(ids[:end])
            pixels = batch["pixel_values"]
            images.append((None if pixels is None else model.vision_features(pixels), batch["image_sizes"]))
    if not prompts:
        return None
    features = [own for own, _ in images if own is not None]
    sizes = [size for _, own in images for size in own]
    ends, config.eos_token_ids = config.eos_token_ids, []  # no answer ends early
    with watch(model, ("lm_head",), (), lambda _, x: states.append(x)):
        answers = [*generate(model, prompts, torch.cat(features) if features else None, sizes, max_new_tokens=8)]
    config.eos_token_ids, worst = ends, 0.0
    for prompt, answer, cached, own in zip(prompts, zip(*answers), torch.stack(states, 1), images):
        ids = torch.tensor([prompt + list(answer[:-1])], device=run.device)
        whole = model.language_model.model(model.embed(ids, *own))[0, len(prompt) - 1 :]
        worst = max(worst, float((whole - cached).norm() / whole.norm()))
    text = f"KV cache: the states of decoding with it differ by {worst:.1%} from those of a pass without it"
    return [f"{text}. Likely cause: a position or a slot is off by one"] if worst > 0.01 else []


# ---------------------------------------------------------------------------------------------------------------------
# the diagnosis

AT_START = (check_loss, check_start, check_replay, check_ranks, check_labels, check_images, check_loss_function)
NOW = (check_training, check_rate, check_gradients, check_units, check_looking, check_cache)


def diagnose(folder: Path, device: str = "cpu") -> tuple[list[str], str]:
    """Return the faults found in a run, and a summary of one line. Draws flow.png in its folder."""
    run = TrainedRun(folder, device)
    results = [check(run) for check in AT_START]
    run.load_trained()
    results += [check(run) for check in NOW]
    draw_flow(run, folder / "flow.png")
    applied = [result for result in results if result is not None]
    found = list(chain.from_iterable(applied))
    count = f"{len(found)} fault{'s' * (len(found) > 1)}" if found else "nothing"
    return found, f"{count} found in {len(applied)} checks{run.note}"


def draw_flow(run: TrainedRun, path: Path):
    """Draw the gradient norm of each layer that trains, and the relative change of its weights since the start."""
    order, changes = list(dict.fromkeys(PARTS.values())), {}
    norms = {layer: norm for part in sorted(run.norms, key=order.index) for layer, norm in run.norms[part].items()}
    for name, (size, change) in run.changes.items():
        changes.setdefault(layer_of(name), []).append(change / size if size else 0)
    panels = {"gradient norm": norms, "change / weight": {layer: np.median(changes.get(layer, 0)) for layer in norms}}
    for axis, title, values in draw_panels(path, panels, [4.6, 4.6], 1 + 0.22 * len(norms)):
        axis.barh(range(len(values)), [max(1e-9, value) for value in values.values()], color=BLUE)
        axis.set_yticks(range(len(values)), values, fontsize=8)
        axis.set(title=title, xscale="log")
        axis.invert_yaxis()
