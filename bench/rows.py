"""What bench.py measures: training, answering, loading, data. Each case times both sides and gives rows of the table.

Limits, by case:

* training: FLOPs of a step by meters.step_flops (PaLM's formula) over the rate of a matrix product; of memory, the
  bytes of weights, gradients and AdamW's two states, without any activation.
* the first token: FLOPs of the forward pass over that rate, or the weights' bytes over the memory's bandwidth,
  whichever takes longer. Only what has to be computed counts: not a picture that is cached, nor turns read before.
* decoding: a step reads every weight of layers and head once, and multiplies it by each row.
* the cache: the bytes that so many positions must take. A cold start: those of the file, which have to be somewhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from bench import contenders as two
from bench.contenders import SHAPES, Job
from bench.pairing import Contender, Limits, Row, pair, rate_row, size_row, time_row, timed
from data import prepare_image
from fast.compile import compile_decoding
from fast.linear import lacks_16_bit
from formats.configs import read_config
from formats.weights import load_checkpoint, load_model
from inputs.images import open_image
from inputs.tokenizer import Tokenizer
from llava import KVCache, Llava
from lora import count_weights
from sample import Chat
from training import meters
from world.drawing import draw_scene
from world.language import TURNS
from world.scenes import make_scene
from world.writer import make_records

PROMPT = 16  # tokens of a prompt without a picture: decoding is what is timed then
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "nf4": 2e-2}  # of the numbers that must agree; see pairing.agree
SLOW = "no instructions for bfloat16 on this CPU: --slow runs it, a step may take minutes"


@dataclass
class Bench:
    """What every case gets. root: folder of the models; rounds: pairs of each row; notes: lines for the user."""

    device: torch.device
    root: Path
    rounds: int
    theirs: bool
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.limits = Limits(self.device)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> str:
        """What people answer in on this device."""
        return "bfloat16" if self.gpu else "float32"

    def folder(self, shape: str) -> Path:
        return two.folder_of(shape, self.root, str(self.device))

    def other(self, make: Callable):
        """Theirs, if it is installed; None, and a note, if it is not or does not run here."""
        if not self.theirs:
            return None
        try:
            return make()
        except (ImportError, RuntimeError, ValueError) as error:  # bitsandbytes without a kernel, a full GPU
            self.notes.append(f"theirs does not run here: {error}"[:200])
            return None

    def pair(self, ours: Contender, theirs: Contender | None, tolerance: str):
        return pair(ours, theirs, self.rounds, TOLERANCE[tolerance])

    def goals(self, cpu: dict | None = None, gpu: dict | None = None) -> dict:
        return (gpu if self.gpu else cpu) or {}


@dataclass
class Case:
    """A measurement by name. left_out: why it does not run here, or None."""

    name: str
    run: Callable[[Bench, str], Iterator[Row]]
    left_out: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# training


def training(bench: Bench, name: str, shape: str, way: str, dtype: str, compiled: bool = False) -> Iterator[Row]:
    """Samples/s, tokens/s and MFU of a step: forward, backward, clipping, AdamW; of a model that is too large for two
    its memory, too. On a CPU each side has a process of its own: in one, either's allocations slow the other's down.
    compiled: ours as with --compile, whose seconds are left out."""
    job, size, found = job_of(bench, shape, way, dtype, compiled), SHAPES[shape], None
    if size.apart or not bench.gpu:
        found = both_alone(bench, job, 1)
        ours, theirs = (each and in_turn(side, job, each["loss"]) for side, each in zip(("ours", "theirs"), found))
        flops = found[0]["flops"]
    else:
        trainer = two.our_trainer(job)
        other = bench.other(partial(two.their_trainer, job))
        ours, flops = trainer.contender(bench.device), trainer.flops
        theirs = other and other.contender(bench.device)
    tolerance = "nf4" if way == "qlora" and dtype == "float32" else dtype
    timing, rate = bench.pair(ours, theirs, tolerance), bench.limits.flops(getattr(torch, dtype))
    full = {"float32": 1.3 if shape == "speedrun" else 1.25, "bfloat16": 1.6}[dtype]
    cpu = {"full": {"goal": full}, "stage1": {"goal": 1.4}}.get(way)
    gpu = {"goal": 1.3} if size.apart and way != "lora" else None
    goals = bench.goals(cpu, gpu)
    steps = rate / flops  # per second, at most
    yield rate_row(name, "samples/s", size.rows, timing, limit=size.rows * steps, **goals)
    yield rate_row(name, "tokens/s", size.rows * size.length, timing, limit=size.rows * size.length * steps, **goals)
    share = bench.goals(gpu={"share": 0.5} if size.apart and way == "full" else None)
    yield rate_row(name, "% MFU", 100 * flops / rate, timing, limit=100, **goals | share)
    if size.apart:
        yield memory_row(bench, name, job, *found)


def job_of(bench: Bench, shape: str, way: str, dtype: str, compiled: bool = False) -> Job:
    recompute = way == "qlora" and SHAPES[shape].apart  # 2048 tokens in 8 GB need it
    return Job(str(bench.folder(shape)), shape, way, dtype, str(bench.device), recompute, compiled)


def both_alone(bench: Bench, job: Job, steps: int) -> tuple[dict, dict | None]:
    """What train_alone says of both sides, each in a process of its own, one after the other."""
    return two.training_process("ours", job, steps), bench.other(lambda: two.training_process("theirs", job, steps))


def in_turn(side: str, job: Job, loss: float) -> Contender:
    """The median of three steps in a new process: two 7B models in training, say, do not fit on one GPU."""
    return Contender(lambda: loss, lambda: median(two.training_process(side, job, 3)["seconds"]))


def training_memory(bench: Bench, name: str, shape: str, way: str, dtype: str) -> Iterator[Row]:
    """Peak bytes of three steps above the bare import, loading included, each side in a process of its own; on a GPU
    those that torch had allocated at most, loading left out."""
    job = job_of(bench, shape, way, dtype)
    yield memory_row(bench, name, job, *both_alone(bench, job, 2))


def memory_row(bench: Bench, name: str, job: Job, ours: dict, theirs: dict | None) -> Row:
    goals, limit = bench.goals({"goal": 1 / 0.7}), ours["fixed"]
    if job.recompute:
        goals, limit = {"share": 1.0}, 8e9  # what it is for: a GPU of 8 GB
    return size_row(name, ours["bytes"], theirs and theirs["bytes"], limit=limit, **goals)


# ---------------------------------------------------------------------------------------------------------------------
# answering


def decoder_bytes(model: Llava) -> int:
    """Bytes of weights that a step of decoding reads: layers, norms and head; of an untied embedding only some rows."""
    decoder = model.language_model
    tied = decoder.lm_head.weight is decoder.model.embed_tokens.weight
    return sum(p.nbytes for p in decoder.parameters()) - (0 if tied else decoder.model.embed_tokens.weight.nbytes)


def forward_flops(model: Llava, tokens: int, pictures: int) -> float:
    """2 per weight and token of the layers, 4 x length x width per layer and token for attention, the head once."""
    decoder, text = model.language_model, model.config.text_config
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * tokens
    layers = 2 * count_weights(decoder.model.layers) + attention
    tower = meters.step_flops(model.requires_grad_(False), 0, 0, pictures)  # nothing trains: its forward pass alone
    return layers * tokens + 2 * decoder.lm_head.weight.numel() + tower


def first_token_limit(bench: Bench, model: Llava, tokens: int, pictures: int) -> float:
    """Milliseconds."""
    flops = forward_flops(model, tokens, pictures) / bench.limits.flops(model.dtype)
    return 1e3 * max(flops, decoder_bytes(model) / bench.limits.bandwidth)


def decoding_limit(bench: Bench, model: Llava, batch: int) -> float:
    """Tokens/s: by the bytes that a step reads, or by what it multiplies, whichever allows less."""
    decoder = model.language_model
    flops = 2 * (count_weights(decoder.model.layers) + decoder.lm_head.weight.numel())  # of one row
    return min(batch * bench.limits.bandwidth / decoder_bytes(model), bench.limits.flops(model.dtype) / flops)


def first_token(bench: Bench, name: str, shape: str, cached: bool) -> Iterator[Row]:
    """Milliseconds from pixels and ids to the first token; cached: from the picture's features, which theirs cannot.
    On a CPU each side has a process of its own, where what is freed is kept as by sample.py, or as glibc does it."""
    folder, dtype = bench.folder(shape), getattr(torch, bench.dtype)
    model = load_model(folder, str(bench.device), dtype)
    prompt, pixels = two.question(model.config, shape, bench.device, dtype)
    if bench.gpu:
        ours = two.our_first_token(model, prompt, pixels, cached)
        other = bench.other(partial(two.their_model, folder, str(bench.device), dtype))
        theirs = other and two.their_first_token(other, prompt, pixels)
    else:
        ours, theirs = (answering(bench, side, folder, shape, cached) for side in ("ours", "theirs"))
    timing = bench.pair(ours, theirs if bench.theirs else None, bench.dtype)
    limit = first_token_limit(bench, model, len(prompt), 0 if cached else 1)
    yield time_row(name, timing, limit=limit, **bench.goals({"goal": 1.25}))


def answering(bench: Bench, side: str, folder: Path, shape: str, cached: bool) -> Contender:
    """The median of a few first tokens in a new process."""
    run = partial(two.reported, "answer_alone", side, str(folder), shape, str(bench.device), bench.dtype, cached)
    return Contender(lambda: torch.tensor(run()["logits"]), lambda: median(run()["seconds"]))


def prompts_of(batch: int) -> list[list[int]]:
    return torch.randint(0, 256, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def decoding(bench: Bench, name: str, shape: str, batch: int, kind: str, compiled: bool = False) -> Iterator[Row]:
    """Tokens/s of all rows together, after the first token. kind: float32, bfloat16 or nf4; compiled: as with
    --compile, whose seconds are left out."""
    folder, prompts, tokens = bench.folder(shape), prompts_of(batch), 32 if batch == 1 else 12
    dtype, bits = dtype_of(bench, kind), 4 if kind == "nf4" else 16
    model = two.our_model(folder, str(bench.device), dtype, bits)
    if compiled:
        compile_decoding(model)
    ours = two.our_decoding(model, prompts, tokens)
    ours.seconds()
    other = bench.other(partial(two.their_model, folder, str(bench.device), dtype, bits))
    theirs = other and two.their_decoding(other, prompts, tokens)
    timing = bench.pair(ours, theirs, kind)
    cpu = {"goal": 1.8} if compiled and kind == "float32" else {}
    cpu |= {"share": 0.75} if cpu and shape == "222m" else {}
    gpu = {"share": 0.8} if batch == 1 and kind == "bfloat16" and shape == "7b" else {}
    yield rate_row(name, "tokens/s", batch, timing, limit=decoding_limit(bench, model, batch), **bench.goals(cpu, gpu))


def dtype_of(bench: Bench, kind: str) -> torch.dtype:
    """The type of what is not in four bits, too."""
    return getattr(torch, bench.dtype if kind == "nf4" else kind)


def decoding_narrower(bench: Bench, name: str, shape: str, kind: str, wider: str) -> Iterator[Row]:
    """Ours against ours at batch 1: fewer bytes per weight should be fewer milliseconds. "theirs" is the wider one."""
    contenders, models = [], []
    for each in (kind, wider):
        bits = 4 if each == "nf4" else 16
        models.append(two.our_model(bench.folder(shape), str(bench.device), dtype_of(bench, each), bits))
        compile_decoding(models[-1])
        contenders.append(two.our_decoding(models[-1], prompts_of(1), 32))
    for contender in contenders:  # one warm-up each; of numbers that were rounded differently, none is compared
        contender.check()
        contender.check = None
        contender.seconds()
    timing = bench.pair(*contenders, kind)
    yield rate_row(name, "tokens/s", 1, timing, limit=decoding_limit(bench, models[0], 1), goal=1.0)


def cache_bytes(bench: Bench, name: str, shape: str) -> Iterator[Row]:
    """Keys and values after a picture, a question and 32 tokens; the limit is what those positions must take."""
    folder, dtype, tokens = bench.folder(shape), getattr(torch, bench.dtype), 32
    model = two.our_model(folder, str(bench.device), dtype)
    prompt, pixels = two.question(model.config, shape, bench.device, dtype)
    text, length = model.config.text_config, len(prompt) + tokens
    cache = KVCache(text, 1, length, like=model.language_model.lm_head.weight)  # what generate() makes
    theirs = None
    if other := bench.other(partial(two.their_model, folder, str(bench.device), dtype)):
        inputs = two.their_inputs([prompt], str(bench.device), pixels)
        found = two.their_answer(other, inputs, tokens, return_dict_in_generate=True).past_key_values
        theirs = sum(layer.keys.nbytes + layer.values.nbytes for layer in found.layers)
    width = text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    limit = 2 * width * (length - 1) * dtype.itemsize  # the last token is not read again
    ours = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    yield size_row(name, ours, theirs, limit=limit)


def second_question(bench: Bench, name: str, shape: str) -> Iterator[Row]:
    """Milliseconds to the first token of a second question about the same picture; theirs reads all of it again."""
    folder, dtype = bench.folder(shape), getattr(torch, bench.dtype)
    model, tokenizer = load_checkpoint(folder, str(bench.device), dtype)
    model.config.eos_token_ids = []
    path, told = picture_file(bench.root / "pictures"), []

    def seconds() -> float:
        chat = Chat(model, tokenizer, path, max_new_tokens=16)
        list(chat.ask("What is this?"))
        told[:] = [chat.last]
        chat.sampling["max_new_tokens"] = 1
        elapsed = timed(lambda: list(chat.ask("And what is beside it?")), bench.device)
        told.append(chat.last)
        return elapsed

    seconds()  # which also tells the prompt: theirs gets the same ids
    before, prompt = len(told[0]["prompt_ids"]) + len(told[0]["ids"]), told[1]["prompt_ids"]
    pixels = prepare_image(open_image(path), model.config).pixels.to(bench.device, dtype)
    other = bench.other(partial(two.their_model, folder, str(bench.device), dtype))
    theirs = other and two.their_first_token(other, prompt, pixels)
    ours = Contender(lambda: two.our_logits(model, [prompt], pixels), seconds)
    limit = first_token_limit(bench, model, len(prompt) - before, 0)
    yield time_row(name, bench.pair(ours, theirs, bench.dtype), limit=limit)


# ---------------------------------------------------------------------------------------------------------------------
# loading


def cold_start(bench: Bench, name: str, shape: str) -> Iterator[Row]:
    """A new process: import, load, look at a picture, say one token. Its memory is all of the process's."""
    folder, path = bench.folder(shape), picture_file(bench.root / "pictures")
    arguments, peaks = [folder, path.resolve(), bench.device, bench.dtype], {}

    def side(which: str) -> Contender:
        def run():
            peaks[which] = int(two.alone(two.FIRST_TOKEN[which] + two.PEAK, *arguments).splitlines()[-1])

        return Contender(run, partial(timed, run, bench.device))

    timing = paired_processes(bench, side)
    yield time_row(name, timing, **bench.goals({"goal": 2.0}))
    limit = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    yield size_row(name, peaks["ours"], peaks.get("theirs"), limit=limit)


def start_up(bench: Bench, name: str) -> Iterator[Row]:
    """A new process that imports sample.py, or transformers' LLaVA, and ends."""

    def side(which: str) -> Contender:
        run = partial(two.alone, two.IMPORT[which])
        return Contender(run, partial(timed, run, bench.device))

    yield time_row(name, paired_processes(bench, side))


def paired_processes(bench: Bench, side: Callable[[str], Contender]):
    """Their first run fills the disk's cache; what they print is not compared."""
    sides = [side("ours"), side("theirs") if bench.theirs else None]
    for one in filter(None, sides):
        one.check()
        one.check = None
    return bench.pair(*sides, "float32")


# ---------------------------------------------------------------------------------------------------------------------
# data


def picture_file(folder: Path, number: int = 0) -> Path:
    """A JPEG of 640 x 480, as large as COCO's: a scene of the embedded world with a photo's noise."""
    path = folder / f"{number}.jpg"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scene, _ = make_scene(0, number, held_out=False)
        pixels = np.asarray(draw_scene(scene, 640).crop((0, 80, 640, 560))).astype(np.int16)
        noise = np.random.default_rng(number).integers(-12, 13, pixels.shape)
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def pictures(bench: Bench, name: str, shape: str) -> Iterator[Row]:
    """Pictures/s of one core, from the file to what the tower takes; bit-equal, or the row fails."""
    folder, paths = bench.folder(shape), [picture_file(bench.root / "pictures", i) for i in range(16)]
    config = read_config(folder)

    def ours() -> torch.Tensor:
        return torch.stack([prepare_image(open_image(path), config).pixels[0] for path in paths])

    def make() -> Callable:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder)

        def load(path: Path) -> torch.Tensor:
            return processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]

        return lambda: torch.stack([load(path) for path in paths])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs = bench.other(make)
        sides = [call and Contender(call, partial(timed, call, bench.device)) for call in (ours, theirs)]
        timing = pair(*sides, bench.rounds, tolerance=0.0)
    finally:
        torch.set_num_threads(threads)
    yield rate_row(name, "pictures/s", len(paths), timing, goal=1.5)


def tokenizing(bench: Bench, name: str, shape: str) -> Iterator[Row]:
    """MB/s of text, record by record as a dataset asks for them; the ids are the same, or the row fails."""
    folder = bench.folder(shape)
    tokenizer = Tokenizer.load(folder)
    records = [record for i in range(1000) for record in make_records(1, i, TURNS)[1]]
    texts = [" ".join(turn["value"] for turn in record["conversations"][1:]) for record in records]
    texts = list(dict.fromkeys(texts))  # what has been seen before, ours would remember

    def ours() -> list[int]:
        return [i for text in texts for i in tokenizer.codec.encode(text)]

    def make() -> Callable:
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(folder)
        return lambda: [i for text in texts for i in other(text, add_special_tokens=False)["input_ids"]]

    theirs = bench.other(make)
    sides = [
        call and Contender(lambda call=call: torch.tensor(call()), partial(timed, call, bench.device))
        for call in (ours, theirs)
    ]
    timing = pair(*sides, bench.rounds, tolerance=0.0)
    yield rate_row(name, "MB/s", sum(len(text.encode()) for text in texts) / 1e6, timing)


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def cases(device: torch.device, chosen: list[str], slow: bool) -> list[Case]:
    """Every case of the chosen shapes on this device; what takes too long here says so instead of running."""
    found, gpu, lame = [], device.type == "cuda", lacks_16_bit() and device.type == "cpu" and not slow

    def add(name: str, run: Callable, *args, left_out: str | None = None):
        found.append(Case(name, lambda bench, title: run(bench, title, *args), left_out))

    for shape in chosen:
        if SHAPES[shape].apart and not gpu:
            add(shape, training, left_out="it needs a GPU")
            continue
        dtypes = ["bfloat16"] if SHAPES[shape].apart else ["float32", "bfloat16"]
        for dtype in dtypes:
            why = SLOW if lame and dtype == "bfloat16" else None
            for way in two.WAYS:
                add(f"{shape}/train/{way}/{dtype}", training, shape, way, dtype, left_out=why)
                add(f"{shape}/train/{way}/{dtype}/compiled", training, shape, way, dtype, True, left_out=why)
            for way in two.WAYS if not SHAPES[shape].apart else ():
                add(f"{shape}/memory/{way}/{dtype}", training_memory, shape, way, dtype, left_out=why)
        add(f"{shape}/first-token/picture", first_token, shape, False)
        add(f"{shape}/first-token/cached-picture", first_token, shape, True)
        add(f"{shape}/first-token/second-question", second_question, shape)
        for kind in [*dtypes, "nf4"]:
            for batch in (1, 8, 32):
                why = SLOW if lame and kind == "bfloat16" and batch > 1 else None
                add(f"{shape}/decode/{kind}/{batch}", decoding, shape, batch, kind, left_out=why)
            add(f"{shape}/decode/{kind}/1/compiled", decoding, shape, 1, kind, True)
        kind, wider = ("nf4", "bfloat16") if gpu else ("bfloat16", "float32")
        add(f"{shape}/decode/{kind}-against-our-{wider}", decoding_narrower, shape, kind, wider)
        add(f"{shape}/kv-cache", cache_bytes, shape)
        add(f"{shape}/cold-start", cold_start, shape)
    add("data/pictures", pictures, "222m")
    add("data/tokenizing", tokenizing, "speedrun")
    add("data/start-up", start_up)
    return found
