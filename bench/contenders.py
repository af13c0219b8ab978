"""The two sides of bench.py: this project, and what a user would take instead (transformers, peft, bitsandbytes).

Both read one folder of random weights and do the same with it. Theirs is imported only where it is used: what our own
side takes to start must not depend on it.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from shutil import rmtree
from statistics import median

import torch
from torch import nn

import train
from bench.pairing import Contender, settle, timed
from clip import CLIPVisionConfig
from formats.configs import config_to_json, read_config
from formats.saving import save_model
from formats.weights import load_model
from inputs.files import publish_folder, read_json
from inputs.tokenizer import SPECIALS, SPLIT, ByteLevel, Tokenizer, roles_of, train_bpe
from llava import IGNORE, Llava, LlavaConfig, TextConfig, generate
from lora import DROPOUT, RANKS
from training import memory, meters, sharding
from training.flags import read_flags
from training.ranks import Distributed, compute_dtype
from training.towers import new_clip, new_decoder
from world.language import TURNS
from world.writer import make_records

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shape:
    """A model, and the batch it trains on: rows of `length` tokens, picture included, the last `supervised` trained on.

    Args: weights: in the folder, and of what trains; apart: too large for two to train on one GPU at the same time.
    """

    make: Callable[[], tuple[LlavaConfig, Tokenizer]]
    rows: int
    length: int
    supervised: int
    weights: torch.dtype = torch.float32
    apart: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# models


def of_speedrun() -> tuple[LlavaConfig, Tokenizer]:
    """What `bash speedrun.sh` trains: towers of size "small", 9 patches a picture, the vocabulary of the world."""
    records = [record for i in range(500) for record in make_records(0, i, TURNS)[1]]
    tokenizer = train_bpe([turn["value"] for record in records for turn in record["conversations"]], merges=600)
    config = new_decoder("small", tokenizer, "llava_hf").config
    config.vision_config = new_clip("small", 24, tokenizer.vocab_size).config.vision_config
    return config, tokenizer


def of_nanovlm() -> tuple[LlavaConfig, Tokenizer]:
    """222 million parameters: CLIP-B/16-224 and a decoder of SmolLM2-135M's shape, about what nanoVLM is."""
    text = TextConfig(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return assembled(text, CLIPVisionConfig(patch_size=16))


def of_llava_7b() -> tuple[LlavaConfig, Tokenizer]:
    """LLaVA-1.5-7B: CLIP-L/14-336 and LLaMA-7B, 64 rows of the embedding for <image> as in llava-hf's files."""
    text = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    vision = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768)
    return assembled(text, vision)


def assembled(text: TextConfig, vision: CLIPVisionConfig) -> tuple[LlavaConfig, Tokenizer]:
    """A LLaVA whose vocabulary is as large as its embedding: what it costs to load is part of what is measured."""
    pairs = (bytes(two) for two in product(range(256), repeat=2))
    tokens = [*(bytes([b]) for b in range(256)), *islice(pairs, text.vocab_size - 256 - len(SPECIALS))]
    ranks = {token: i for i, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    tokenizer = Tokenizer(ByteLevel(ranks, SPLIT), specials, roles_of(specials, {}))
    ends = {"eos_token_ids": [tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}
    return LlavaConfig(text, vision, image_token_index=tokenizer.image_id, **ends), tokenizer


SHAPES = {
    "speedrun": Shape(of_speedrun, rows=64, length=116, supervised=16),
    "222m": Shape(of_nanovlm, rows=4, length=260, supervised=40),
    "7b": Shape(of_llava_7b, rows=1, length=2048, supervised=400, weights=torch.bfloat16, apart=True),
}


def folder_of(name: str, root: Path, device: str) -> Path:
    """The folder of a shape's random weights, written if it is not there or holds another model."""
    folder, shape = (root / name).resolve(), SHAPES[name]
    config, tokenizer = shape.make()
    wanted = json.loads(json.dumps(config_to_json(config)))
    if folder.exists() and read_json(folder / "config.json") == wanted:
        return folder
    rmtree(folder, ignore_errors=True)

    def write(target: Path):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.weights)
        try:
            with torch.device(device):  # 7 billion random numbers take a GPU a second, and a CPU minutes
                model = Llava(config)
        finally:
            torch.set_default_dtype(default)
        save_model(model, target)
        tokenizer.save(target)

    publish_folder(folder, write)
    return folder


def batch_of(config: LlavaConfig, shape: Shape) -> dict[str, torch.Tensor]:
    """A picture at the start of every row, then ids of single bytes, which are words in every vocabulary."""
    generator, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    input_ids = torch.randint(0, 256, (shape.rows, shape.length), generator=generator)
    input_ids[:, 1 : 1 + config.vision_config.num_patches] = config.image_token_index
    labels = input_ids.masked_fill(torch.arange(shape.length) < shape.length - shape.supervised, IGNORE)
    pixel_values = torch.randn(shape.rows, 3, side, side, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


# ---------------------------------------------------------------------------------------------------------------------
# theirs


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def their_model(folder: Path, device: str, dtype: torch.dtype, bits: int = 16) -> nn.Module:
    """transformers' LLaVA with the attention that a user gets; the decoder's layers in bitsandbytes' NF4, if bits is 4.

    Raises whatever bitsandbytes raises where it does not run.
    """
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if bits == 16:
        return LlavaForConditionalGeneration.from_pretrained(folder, **options).to(device).eval()
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantized = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=whole, **four)
    options |= {"quantization_config": quantized, "device_map": {"": device}}
    return LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()


def bare(side: str):
    """Import what a side needs, so that memory can be counted from there; of torch what its optimizers import."""
    theirs = ("transformers", "transformers.models.llava.modeling_llava", "peft") if side == "theirs" else ()
    for name in ("torch._dynamo", *theirs):
        if installed(name.split(".")[0]):
            importlib.import_module(name)


# ---------------------------------------------------------------------------------------------------------------------
# training

WAYS = {"stage1": 1, "full": 2, "lora": 2, "qlora": 2}  # what trains, and in which stage


@dataclass(frozen=True)
class Job:
    """A training run. way: of WAYS; dtype: of the arithmetic, "float32" or "bfloat16"; recompute: gradient
    checkpointing; compiled: ours as with --compile."""

    folder: str
    shape: str
    way: str
    dtype: str
    device: str
    recompute: bool = False
    compiled: bool = False


@dataclass
class Trainer:
    """step() -> the loss; flops of a step, by meters.step_flops; fixed: bytes of weights, gradients and states."""

    step: Callable[[], float]
    flops: float = 0.0
    fixed: int = 0

    def contender(self, device: torch.device) -> Contender:
        return Contender(self.step, partial(timed, self.step, device))


def our_trainer(job: Job) -> Trainer:
    """train.py's own step on its own flags."""
    shape = SHAPES[job.shape]
    flags = ["--stage", str(WAYS[job.way]), "--dtype", job.dtype, "--device", job.device, "--lr", "1e-5"]
    if "lora" in job.way:
        flags += ["--lora", "llm", "--bits", "4" if job.way == "qlora" else "16"]
    else:
        flags += ["--weights", str(shape.weights).removeprefix("torch.")]
    args = read_flags("", flags)
    args.model = Path(job.folder)
    ranks = Distributed(job.device)
    ranks.print0 = lambda text: None
    model = load_model(job.folder, job.device, torch.float32, bits=args.bits)
    train.choose_trainable(model, args.train)
    train.adapt(args, model)
    sharding.cast_weights(model, args.shard, getattr(torch, args.weights), compute_dtype(ranks.device, args.dtype))
    model.language_model.model.recompute = job.recompute
    model.train()
    if job.compiled:
        train.compile_layers(model)
    optimizer, batch, done = train.make_optimizer(model, args, ranks), batch_of(model.config, shape), iter(range(10**9))

    def step() -> float:
        return train.train_step(args, ranks, model, optimizer, [batch], next(done))["loss"]

    memory.estimate(model, args.shard, ranks.world_size, compute_dtype(ranks.device, args.dtype), batch)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    flops = meters.step_flops(model, shape.rows * shape.length, shape.length, shape.rows)
    return Trainer(step, flops, sum(p.nbytes for p in model.parameters()) + 3 * trained)


def their_trainer(job: Job) -> Trainer:
    """What Hugging Face's Trainer does in a step, without its loop: autocast, clipping, fused AdamW."""
    shape, four = SHAPES[job.shape], job.way == "qlora"
    device, narrow = torch.device(job.device), job.dtype == "bfloat16"
    dtype = torch.bfloat16 if four and narrow else shape.weights
    model = their_model(Path(job.folder), job.device, dtype, 4 if four else 16)
    if "lora" in job.way:
        model = their_lora(model, job)
    else:
        model.requires_grad_(False)
        model.model.language_model.requires_grad_(job.way == "full")
        model.lm_head.requires_grad_(job.way == "full")
    if job.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, p in model.named_parameters():
        if "multi_modal_projector" in name:
            p.requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    inputs = batch_of(read_config(Path(job.folder)), shape)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def step() -> float:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return Trainer(step)


def their_lora(model: nn.Module, job: Job) -> nn.Module:
    """peft's LoRA on every linear layer of the decoder, as ours; in four bits, prepared as its documentation says."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if job.way == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.recompute)
    layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    rank = RANKS["llm"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=DROPOUT, target_modules=layers))


TRAINERS = {"ours": our_trainer, "theirs": their_trainer}


# ---------------------------------------------------------------------------------------------------------------------
# in a process of its own


def memory_of(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def train_alone(side: str, job: dict, steps: int):
    """Print as JSON: the first loss, seconds of the steps after it, peak bytes of training above the bare import."""
    bare(side)
    job = Job(**job)
    device, before = torch.device(job.device), memory_of("VmRSS")
    trainer = TRAINERS[side](job)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = trainer.step()
    seconds = [timed(trainer.step, device) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_of("VmHWM") - before
    print(
        json.dumps({"loss": first, "seconds": seconds, "bytes": peak, "flops": trainer.flops, "fixed": trainer.fixed})
    )


def answer_alone(side: str, folder: str, shape: str, device: str, dtype: str, cached: bool):
    """Print as JSON: logits of the first token, and the seconds it takes, a few times."""
    kind, place = getattr(torch, dtype), torch.device(device)
    if side == "ours":
        model = our_model(Path(folder), device, kind)
        contender = our_first_token(model, *question(model.config, shape, place, kind), cached)
    else:
        model = their_model(Path(folder), device, kind)
        contender = their_first_token(model, *question(read_config(Path(folder)), shape, place, kind))
    logits = contender.check()[0, :1000].tolist()  # which also warms up
    contender.seconds()
    print(json.dumps({"logits": logits, "seconds": [contender.seconds() for _ in range(5)]}))


def alone(code: str, *arguments) -> str:
    """What Python code prints in a new process, in this folder. Raises ValueError with the last line of its error."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.splitlines() or [f"it ended with status {done.returncode}"])[-1])
    return done.stdout


def training_process(side: str, job: Job, steps: int) -> dict:
    return reported("train_alone", side, asdict(job), steps)


def reported(function: str, *arguments) -> dict:
    """What a function of this file prints as JSON, run in a process of its own."""
    code = f"import json, sys, contenders; contenders.{function}(*json.loads(sys.argv[1]))"
    return json.loads(alone(code, json.dumps(arguments)).splitlines()[-1])


# From nothing to the first token, as a user would write it; then the most memory that the process ever had.
FIRST_TOKEN = {
    "ours": """
import sys, torch
from pathlib import Path
from sample import Chat
from formats.adapters import load_with_adapter
model, tokenizer = load_with_adapter(Path(sys.argv[1]), None, sys.argv[3], getattr(torch, sys.argv[4]))
print("".join(Chat(model, tokenizer, Path(sys.argv[2]), max_new_tokens=1).ask("What is this?")).encode())
""",
    "theirs": """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, path, device, dtype = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
processor = AutoProcessor.from_pretrained(folder)
text = "USER: <image>\\nWhat is this? ASSISTANT:"
inputs = processor(images=Image.open(path), text=text, return_tensors="pt").to(device, getattr(torch, dtype))
ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(ids[0, -1:]).encode())
""",
}
PEAK = """
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1024 * int(line.split()[1]))
"""
IMPORT = {"ours": "import sample", "theirs": "from transformers import LlavaForConditionalGeneration"}


# ---------------------------------------------------------------------------------------------------------------------
# answering


def our_model(folder: Path, device: str, dtype: torch.dtype, bits: int = 16) -> Llava:
    """Loaded as sample.py does, but that nothing ends an answer."""
    model = load_model(folder, device, dtype, bits=bits)
    model.config.eos_token_ids = []
    return model


@torch.inference_mode()
def our_logits(model: Llava, prompts: list[list[int]], pixels: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, V) after prompts of one length, float32."""
    features = None if pixels is None else model.vision_features(pixels)
    hidden = model.language_model.model(model.embed(torch.tensor(prompts, device=model.device), features))
    return model.language_model.lm_head(hidden[:, -1]).float()


@torch.inference_mode()
def their_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1).logits[:, -1].float()


def their_inputs(prompts: list[list[int]], device: str, pixels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What transformers' processor returns for prompts of one length."""
    ids = torch.tensor(prompts, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {} if pixels is None else {"pixel_values": pixels}
    )


def our_decoding(model: Llava, prompts: list[list[int]], tokens: int) -> Contender:
    """Seconds of a step."""

    def seconds() -> float:
        times = []
        for _ in generate(model, prompts, max_new_tokens=tokens):
            settle(model.device)
            times.append(time.perf_counter())
        return of_a_step(times)

    return Contender(lambda: our_logits(model, prompts), seconds)


def of_a_step(times: list[float]) -> float:
    """The median, which leaves out the one in which ours is recorded as a graph, as it does whatever else is rare."""
    return median(after - before for before, after in pairwise(times))


class Clock:
    """A streamer of transformers: notes when each token came. The first call hands over the prompt."""

    def __init__(self):
        self.times = []

    def put(self, ids: torch.Tensor):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def their_decoding(model: nn.Module, prompts: list[list[int]], tokens: int) -> Contender:
    inputs = their_inputs(prompts, model.device)

    def seconds() -> float:
        clock = Clock()
        their_answer(model, inputs, tokens, streamer=clock)
        return of_a_step(clock.times[1:])

    return Contender(lambda: their_logits(model, inputs), seconds)


def their_answer(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int, **options):
    """Greedy, to exactly so many tokens."""
    exact = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    return model.generate(**inputs, **exact, pad_token_id=0, **options)


def question(config: LlavaConfig, shape: str, device: torch.device, dtype: torch.dtype):
    """A prompt with a picture, and its pixels: the first row of the training batch without its answer."""
    size, batch = SHAPES[shape], batch_of(config, SHAPES[shape])
    prompt = batch["input_ids"][0, : size.length - size.supervised].tolist()
    return prompt, batch["pixel_values"][:1].to(device, dtype)


def our_first_token(model: Llava, prompt: list[int], pixels: torch.Tensor, cached: bool) -> Contender:
    """Args: cached: the picture's features are at hand, as for every question after the first."""
    with torch.inference_mode():
        kept = model.vision_features(pixels)

    @torch.inference_mode()
    def answer():
        features = kept if cached else model.vision_features(pixels)
        next(generate(model, [prompt], features, max_new_tokens=1))

    return Contender(lambda: our_logits(model, [prompt], pixels), partial(timed, answer, model.device))


def their_first_token(model: nn.Module, prompt: list[int], pixels: torch.Tensor) -> Contender:
    """From the pixels, always: generate() takes nothing else."""
    inputs = their_inputs([prompt], model.device, pixels)
    return Contender(
        lambda: their_logits(model, inputs), partial(timed, lambda: their_answer(model, inputs, 1), model.device)
    )
