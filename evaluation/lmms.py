"""This project's models in lmms-eval, which finds them by the entry point lmms_eval.models of pyproject.toml.

    python -m lmms_eval --model llava_from_scratch --model_args pretrained=DIR --tasks mme,pope --batch_size 16

It answers tasks of every output type. Written for lmms-eval 0.7.3, which imports this file; nothing of ours does.
"""

import sys
from pathlib import Path

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image, ImageOps
from tqdm import tqdm

from data import PreparedImage, prepare_image, render_dialogue
from evaluation.answering import Cost, answer_prompts
from evaluation.likelihood import answer_likelihood
from evaluation.predictions import group
from fast.accelerate import accelerate
from formats.adapters import load_with_adapter
from formats.weights import choose_dtype, choose_template
from inputs.images import to_rgb
from inputs.records import Turn, question_turn
from training.ranks import choose_device

READ = {"until", "max_new_tokens", "do_sample", "temperature", "top_p", "num_beams"}  # keys of gen_kwargs


class LlavaFromScratch(lmms):
    """Args, as in --model_args: pretrained: the model's folder; the others are flags of eval.py."""

    is_simple, options_at = True, 1  # options_at: the place of gen_kwargs in a request

    def __init__(self, pretrained, adapter=None, template=None, bits=16, dtype="auto", device=None, batch_size=1):
        super().__init__()
        device, adapter = choose_device(device), Path(adapter) if adapter else None
        loaded = load_with_adapter(Path(pretrained), adapter, device, choose_dtype(dtype, device), int(bits))
        self.model, self.tokenizer = loaded
        choose_template(self.model.config, self.tokenizer, template)
        accelerate(self.model)
        if torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.batch_size, self.unread = self.model.device, int(batch_size), set()

    def read(self, args: tuple) -> tuple[list[Turn], list[PreparedImage]]:
        """Dialogue and images of a request to generate."""
        context, _, doc_to_visual, doc_id, task, split = args
        images = self.prepare(doc_to_visual(self.task_dict[task][split][doc_id]))
        return [question_turn(context, len(images))], images

    def prepare(self, images: list | None) -> list[PreparedImage]:
        if wrong := [image for image in images or [] if not isinstance(image, Image.Image)]:
            raise ValueError(f"this model reads images, not {wrong[0]!r:.60}")
        if images and self.model.config.vision_config is None:
            raise ValueError("this model is a decoder without a vision tower")
        upright = (to_rgb(ImageOps.exif_transpose(image), Path("an image")) for image in images or [])
        return [prepare_image(image, self.model.config) for image in upright]

    def answer(self, dialogues: list[tuple[list[Turn], list[PreparedImage]]], options: dict) -> list[str]:
        """Answers to a batch, each up to the first text of `until`. Raises ValueError for beam search."""
        if unread := options.keys() - READ - self.unread:
            self.unread |= unread
            print(f"gen_kwargs that are not read: {', '.join(sorted(unread))}", file=sys.stderr)
        if (options.get("num_beams") or 1) > 1:
            raise ValueError("beam search is not implemented: --gen_kwargs num_beams=1")
        sampling, template, prompts = {}, self.model.config.template, []
        if options.get("do_sample", True) and options.get("temperature"):
            sampling = {"temperature": float(options["temperature"]), "top_p": float(options.get("top_p") or 1)}
        for turns, images in dialogues:
            ids, _ = render_dialogue(turns, self.tokenizer, template, [image.tokens for image in images])
            prompts.append((ids, images))
        length, until = int(options.get("max_new_tokens") or 1024), options.get("until") or []
        texts = answer_prompts(self.model, self.tokenizer, prompts, length, Cost(), **sampling)
        for stop in filter(None, [until] if isinstance(until, str) else until):
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def generate_until(self, requests: list) -> list[str]:
        answers, size, bar = {}, self.batch_size, tqdm(total=len(requests), disable=self.rank != 0)
        for indices in group((repr(request.args[self.options_at]), i) for i, request in enumerate(requests)).values():
            indices.sort(key=lambda i: -len(requests[i].args[0]))  # questions of similar length share a batch
            for batch in (indices[k : k + size] for k in range(0, len(indices), size)):
                dialogues = [self.read(requests[i].args) for i in batch]
                answers.update(zip(batch, self.answer(dialogues, requests[batch[0]].args[self.options_at])))
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """The answers of all rounds of each request; the task makes each question from the answers before it."""
        return [self.answer_rounds(*request.args) for request in tqdm(requests, disable=self.rank != 0)]

    def answer_rounds(self, context, options, doc_to_visual, doc_to_text, doc_id, task, split) -> list[str]:
        doc, answers, info, ended = self.task_dict[task][split][doc_id], [], None, False
        images = doc_to_visual(doc)
        while not ended:
            prepared = self.prepare(images)
            answers = [*answers, *self.answer([([question_turn(context, len(prepared))], prepared)], options)]
            state = {"previous_output": answers, "round_idx": len(answers), "previous_round_info": info}
            images, context, ended, answers, info = doc_to_text(doc, **state)
        return list(answers)

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is greedy.

        Of the choices of a multiple_choice task, lmms-eval takes the one with the smallest value, because its models
        return losses: there, where the continuation is a text and not a function, the log-probability is negated.
        """
        results = []
        for context, target, doc_to_visual, doc_id, task, split in (request.args for request in tqdm(requests)):
            doc, is_choice = self.task_dict[task][split][doc_id], isinstance(target, str)
            images, text = self.prepare(doc_to_visual(doc)), (target if is_choice else target(doc)).strip()
            turn = question_turn(context, len(images))
            value, is_greedy = answer_likelihood(self.model, self.tokenizer, turn, images, text)
            results.append((-value if is_choice else value, is_greedy))
        return results


MANIFEST = ModelManifest("llava_from_scratch", simple_class_path=f"{__name__}.LlavaFromScratch")
