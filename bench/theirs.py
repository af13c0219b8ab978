"""The reference's side of a comparison: transformers, with peft for LoRA and bitsandbytes for NF4."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration  # at once, not when it is used
from transformers.utils import logging

from bench.models import Job, make_batch
from formats.configs import read_config
from lora import DROPOUT, RANKS

ADAPTED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def load(job: Job, dtype: torch.dtype, bits: int) -> nn.Module:
    """Load transformers' LLaVA with its default attention; with 4 bits, the decoder's layers in bitsandbytes' NF4."""
    logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if bits == 16:
        return LlavaForConditionalGeneration.from_pretrained(job.folder, **options).to(job.device).eval()
    unquantized = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantized = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=unquantized, **nf4)
    options |= {"quantization_config": quantized, "device_map": {"": job.device}}
    return LlavaForConditionalGeneration.from_pretrained(job.folder, **options).eval()


def load_for_training(job: Job) -> nn.Module:
    """Load a model that trains the same parameters as in ours.py, with LoRA and NF4 as in peft's documentation."""
    quantized = job.way == "qlora"
    dtype = torch.bfloat16 if quantized and job.dtype == "bfloat16" else torch.float32
    model = load(job, dtype, 4 if quantized else 16)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.requires_grad_(False)
    if "lora" in job.way:
        options = {"lora_dropout": DROPOUT, "target_modules": ADAPTED}
        model = get_peft_model(model, LoraConfig(r=RANKS["llm"], lora_alpha=2 * RANKS["llm"], **options))
    for name, p in model.named_parameters():
        decoder = job.way == "stage2" and ("language_model" in name or "lm_head" in name)
        if decoder or "multi_modal_projector" in name:
            p.requires_grad_(True)
    return model.train()


def make_step(side: str, job: Job) -> Callable[[], float]:
    """Return a function that does a step of Hugging Face's Trainer and returns its loss."""
    device, autocast = torch.device(job.device), job.dtype == "bfloat16"
    model = load_for_training(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    inputs = make_batch(read_config(Path(job.folder)), job)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def step() -> float:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def make_answerer(side: str, job: Job, prompts: list[list[int]], pixels: torch.Tensor | None) -> tuple:
    """Return what ours.py returns, with transformers' generate()."""
    model = load(job, getattr(torch, job.dtype), job.bits)
    ids = torch.tensor(prompts, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pixels is not None:
        inputs["pixel_values"] = pixels

    def decode(tokens: int) -> list[float]:
        times, exact = [], {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        clock = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
        model.generate(**inputs, **exact, streamer=clock)
        return times[1:]  # the first call hands over the prompt

    with torch.inference_mode():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, :500].float().flatten().tolist()
    return logits, decode
