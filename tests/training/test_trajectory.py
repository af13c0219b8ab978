"""Two hundred steps of training are those of transformers' LLaVA under torch's AdamW: the loss of every one, to 1e-4.

From theirs come the model, the loss (its sum over all micro-batches' tokens), the gradients, AdamW, the clipping and
the falling part of the schedule; from ours only what goes in: records as batches, in our order.
"""

import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import train
from data import Records, collate
from formats.saving import save_model
from formats.weights import load_model
from inputs.index import read_records
from inputs.mixture import Source, batches, epochs
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from training.towers import assemble

transformers = pytest.importorskip("transformers")

STEPS, BATCH, ACCUMULATE, WARMUP, CLIP, BETAS = 200, 4, 2, 0.03, 1.0, (0.9, 0.99)
RATES = {1: 1e-3, 2: 5e-4}


def ragged(world, folder):
    """Files of records for both stages: with an image, with two, without; of one question to all; cut short."""
    captions, dialogues = (json.loads((world / f"{kind}.json").read_text()) for kind in ("captions", "instruct"))
    for records in (captions, dialogues):
        for i, record in enumerate(records):
            talk = record["conversations"]
            record["conversations"] = talk = talk[: 2 * (1 + i % max(1, len(talk) // 2))]
            if i % 4 == 1:  # text only
                talk[0]["value"] = talk[0]["value"].replace("<image>", "").strip()
                del record["image"]
            elif i % 8 == 2:
                talk[0]["value"] = "<image>" + talk[0]["value"]
                record["image"] = [record["image"], records[i - 2]["image"]]
            elif i % 8 == 3:
                talk[-1]["value"] = talk[-1]["value"].split()[0]
    for name, records in (("captions", captions), ("dialogues", dialogues)):
        (folder / f"{name}.json").write_text(json.dumps(records))


def rate_of(step):
    """The share of the peak at a step. Their rise starts from 0, which wastes a step; ours from 1 / n."""
    rise = math.ceil(WARMUP * STEPS)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise)))


def their_losses(folder, data, images, template, stage):
    """The loss of each step of the same run through transformers and torch."""
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    theirs.requires_grad_(False)
    for part in [theirs.model.multi_modal_projector, *([theirs.model.language_model, theirs.lm_head][: 2 * stage - 2])]:
        part.requires_grad_(True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for p in trained:  # as in LLaVA, a step without images is one with a gradient of zero: Adam's means decay in it
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(trained, lr=RATES[stage], betas=BETAS, weight_decay=0.0, fused=False)
    schedule = LambdaLR(optimizer, rate_of)
    tokenizer, config = Tokenizer.load(folder), load_model(folder).config
    dataset = Records([Source(read_records(data), images)], tokenizer, config, 1024, template=template)
    losses, order = [], epochs(dataset.sizes, [1.0], 0)
    for step in batches(order, BATCH, 0, 0, STEPS, rank=0, world=1, lengths=dataset.lengths()):
        samples, share, total = [dataset[i] for i in step], BATCH // ACCUMULATE, 0.0
        supervised = sum(label != IGNORE for sample in samples for label in sample["labels"][1:])
        for start in range(0, BATCH, share):
            micro = samples[start : start + share]
            batch = collate(micro, tokenizer.pad_id)
            inputs = {name: batch[name] for name in ("input_ids", "labels", "pixel_values")}
            longest = batch["input_ids"].shape[1]
            inputs["attention_mask"] = (
                torch.tensor([[i < len(one["ids"]) for i in range(longest)] for one in micro]) * 1
            )
            loss = theirs(**inputs, num_items_in_batch=supervised).loss
            if loss.requires_grad:  # not without an image, if only the projector trains
                loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(total)
    return losses


def our_losses(command, stage, model, data, images, out):
    flags = ["--stage", stage, "--model", model, "--data", data, "--images", images, "--steps", STEPS, "--out", out]
    flags += ["--batch-size", BATCH, "--accumulate", ACCUMULATE, "--lr", RATES[stage], "--warmup", WARMUP]
    flags += ["--clip-grad", CLIP, "--beta2", BETAS[1], "--seed", 0, "--device", "cpu", "--dtype", "float32"]
    command(train, *flags)
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def apart(ours, theirs):
    assert len(ours) == len(theirs) == STEPS
    return max(abs(a - b) / b for a, b in zip(ours, theirs))


def test_two_hundred_steps_of_both_stages_lose_what_transformers_loses(tiny, command, tmp_path):
    ragged(tiny.world, tmp_path)
    model, tokenizer = assemble(tiny.clip, tiny.decoder, "mlp2x_gelu", seed=0)
    start = tmp_path / "start"
    start.mkdir()
    save_model(model, start)
    tokenizer.save(start)
    template = {1: "plain", 2: model.config.template}
    for stage, data in ((1, tmp_path / "captions.json"), (2, tmp_path / "dialogues.json")):
        ours = our_losses(command, stage, start, data, tiny.world, tmp_path / f"stage{stage}")
        theirs = their_losses(start, data, tiny.world, template[stage], stage)
        print(f"stage {stage}: {ours[0]:.3f} to {ours[-1]:.3f}, at most {apart(ours, theirs):.1e} apart")
        assert apart(ours, theirs) <= 1e-4
        start = tmp_path / f"stage{stage}"


def test_the_schedule_falls_as_theirs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * STEPS), STEPS)
    for step in range(STEPS):
        own, (other,) = train.learning_rate(step, STEPS, 1.0, WARMUP), theirs.get_last_lr()
        rises = step < math.ceil(WARMUP * STEPS)
        assert own == pytest.approx(rate_of(step), abs=1e-12)
        assert other == pytest.approx(rate_of(step - 1) if rises and step else 0 if rises else own, abs=1e-12)
        optimizer.step()
        theirs.step()
