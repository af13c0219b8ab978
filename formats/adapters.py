"""Adapters: the tensors that a LoRA run trained, in files of their own, without the base model.

An adapter is a folder in the layout of Hugging Face's peft, which can read it:

    adapter_config.json          ranks, alphas, and the exact path of every adapted layer
    adapter_model.safetensors    base_model.model.PATH.lora_A.weight, ...lora_B.weight; other trained tensors whole
    config.json                  of the whole model, for its template and image mode

Folders that peft or LLaVA's authors wrote are read too. The authors keep the projector in a second file. Other methods
than LoRA have files of the same kind: tuning_files.py.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from formats.configs import config_to_json, read_config
from formats.layouts import EMBEDDING, HEAD, LLAVA_LAYOUTS, Layout, choose_layout, llama, match, split, to_layout
from formats.saving import merged_adapters
from formats.tensors import FLOATS, LazyTensor, open_tensors
from formats.tuning_files import HUB_WEIGHTS, KINDS, check_values, find_kind, name_parts, take_parts
from formats.weights import build_model, grow_vocabulary, load_checkpoint, load_tokenizer, open_model
from inputs.files import fingerprint, read_json, write_json
from inputs.tokenizer import Tokenizer, find_vocabulary
from inputs.vocabularies import MAX_IDS
from llava import Llava, LlavaConfig
from lora import DoRALinear, LoRALinear, NF4Linear, base_weight, lora_scale
from variants.image_lora import ImageRows
from variants.tuning import Tuning, attach_tuning, find_differences

PREFIX = "base_model.model."  # of every tensor's name in peft's files
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
AUTHORS_WEIGHTS = "non_lora_trainables.bin"  # the file in which LLaVA's authors keep the projector
# Options of peft that change the arithmetic or train additional tensors.
UNSUPPORTED = ("lora_bias", "layer_replication", "target_parameters", "use_qalora", "use_bdlora")
UNSUPPORTED += ("alora_invocation_tokens", "eva_config", "arrow_config", "monteclora_config")
ROWS = ".token_adapter.trainable_tokens_delta"  # ends the name of rows of an embedding, whose ids are in the config
SUPPORTED = {"peft_type": ("LORA",), "bias": (None, "none")}
SUPPORTED["init_lora_weights"] = (None, True, False, "gaussian", "orthogonal")  # PiSSA and others change the base

# ---------------------------------------------------------------------------------------------------------------------
# writing


def save_adapter(
    trained: dict[str, torch.Tensor], folder: Path, config: LlavaConfig, layers: dict[str, tuple[int, float]],
    dropout: float, base: Path, sample: dict[str, list[float]],
):  # fmt: skip
    """Write the trained tensors as an adapter.

    Args: trained: all trained tensors by our names, A, B and others; config: of the whole model; layers: rank and
    alpha by path, from add_lora; base: folder of the base model; sample: of its weights, from sample_weights.
    Raises ValueError if peft has no name for some of the tensors, see to_layout.
    """
    # peft sees the modules of transformers 5 in memory, so it expects their names.
    layout = LLAVA_LAYOUTS["LLaVA, transformers 5 in memory"] if config.vision_config else llama("model.", "")
    renamed = to_layout(trained, layout)
    names = {path: next(iter(to_layout({f"{path}.weight": torch.empty(0)}, layout))) for path in layers}
    modules = {names[path].removesuffix(".weight"): values for path, values in layers.items()}
    rank, alpha = next(iter(modules.values()))
    whole = {name.split(".")[0] for name in trained if ".lora_" not in name}
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "task_type": None, "inference_mode": True}
    values |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": False, "bias": "none"}
    values |= {"target_modules": list(modules), "modules_to_save": sorted(whole) or None, "fan_in_fan_out": False}
    values["use_dora"] = any(name.endswith(".lora_magnitude_vector") for name in trained)
    values["rank_pattern"] = {re.escape(path): r for path, (r, _) in modules.items() if r != rank}
    values["alpha_pattern"] = {re.escape(path): a for path, (_, a) in modules.items() if a != alpha}
    write_json(folder / CONFIG, values)
    write_json(folder / "config.json", config_to_json(config))
    metadata = {"base": json.dumps(sample)}  # a single entry: safetensors writes several in random order
    save_file({PREFIX + name: tensor for name, tensor in renamed.items()}, folder / WEIGHTS[0], metadata=metadata)


def sample_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """64 weights from each of 8 layers, by path: enough to recognize a base, even a quantized one."""
    paths, found = list(paths), {}
    for path in paths[:: -(-len(paths) // 8)]:
        flat = base_weight(model.get_submodule(path)).flatten().float()
        found[path] = flat[:: -(-len(flat) // 64)].tolist()
    return found


def sample_base(model: nn.Module, layers: Iterable[str]) -> dict[str, list[float]]:
    """Weights of layers of the decoder, and of a projector that stays frozen: the adapter needs the same one."""
    linears = {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    projector = {path: part for path, part in linears.items() if path.startswith("multi_modal_projector")}
    frozen = [path for path, part in projector.items() if not part.weight.requires_grad]
    return sample_weights(model, layers) | (sample_weights(model, frozen) if frozen else {})


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass
class Adapter:
    """The content of an adapter's folder, under our names."""

    folder: Path
    sha256: str  # of the file with A and B
    lora: dict[str, tuple]  # path of a layer: A (r, in), B (out, r), scale, and DoRA's lengths (out,) or None
    replaced: dict[str, torch.Tensor]  # tensors that replace those of the base; they may have more rows
    rows: dict[str, tuple[list[int], torch.Tensor]]  # ids of a matrix's rows, and their new values
    tied: bool  # a replaced embedding is the head, too, if it is in the base
    base_sample: dict[str, list[float]]  # from sample_weights; empty in folders of other programs
    config: LlavaConfig | None  # of the whole model, if the folder has it
    has_template: bool  # False: the template and the image mode of `config` are guesses
    tuning: Tuning | None = None  # of another method than LoRA


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_adapter(folder: Path, vision: Path | None = None) -> Adapter:
    """Read an adapter of ours, of peft or of LLaVA's authors. Raises ValueError if it is malformed or unsupported.

    Args: vision: see read_config.
    """
    values = read_peft_config(folder)
    files = HUB_WEIGHTS if find_kind(values) == "bottleneck" else WEIGHTS
    path = next((folder / name for name in files if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: holds neither {' nor '.join(files)}")
    pairs, whole = read_tensors(path, [*open_tensors(path, PREFIX).items(), *open_authors_weights(folder).items()])
    by_matrix = {name.removesuffix(ROWS) + ".weight": whole.pop(name) for name in list(whole) if name.endswith(ROWS)}
    parts = take_parts(path, values, whole)
    names = [*(f"{name}.weight" for name in (*pairs, *filter(None, parts))), *whole, *by_matrix]
    layout = LLAVA_LAYOUTS[choose_layout(names, LLAVA_LAYOUTS)]
    if unknown := [name for name in names if not match(name, layout)]:
        raise ValueError(f"{path}: {len(unknown)} tensors belong to no part of a LLaVA: {', '.join(unknown[:3])}")
    if bool(pairs) == bool(parts):
        raise ValueError(f"{path}: holds {'LoRA and another method' if pairs else 'no LoRA'}")
    lora, replaced = {}, {}
    for name, pair in pairs.items():
        lora |= read_layer(path, name, pair, values, layout)
    for name, tensor in whole.items():
        ours, transposed = match(name, layout)
        replaced |= zip(ours, split(tensor, len(ours), transposed))
    rows = {match(name, layout)[0][0]: read_rows(path, name, rows, values) for name, rows in by_matrix.items()}
    config = read_config(folder, vision) if (folder / "config.json").exists() else None
    has_template = config is not None and "template" in read_json(folder / "config.json")
    tied, sample = values.get("ensure_weight_tying") is True, read_base_sample(path)
    tuning, sha256 = name_parts(values, parts, layout), fingerprint(path)["sha256"]
    return Adapter(folder, sha256, lora, replaced, rows, tied, sample, config, has_template, tuning)


def read_rows(path: Path, name: str, rows: torch.Tensor, values: dict) -> tuple[list[int], torch.Tensor]:
    """The ids of the trained rows of the matrix `name`, from trainable_token_indices, and the rows."""
    ids = values.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((ids[key] for key in ids if name.removesuffix(".weight").endswith(key)), None)
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < MAX_IDS for i in ids)
    if not known or rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(f"{path}: {name} has {list(rows.shape)} trained rows, whose ids {CONFIG} gives as {ids!r:.99}")
    return ids, rows


def read_peft_config(folder: Path) -> dict:
    """adapter_config.json, its patterns compiled. Raises ValueError if it is missing, malformed or unsupported."""
    if not is_adapter(folder):
        raise ValueError(f"{folder}: holds no {CONFIG}, so it is no adapter")
    values = read_json(folder / CONFIG)
    if find_kind(values):
        check_values(folder / CONFIG, values)
        return values
    wrong = [f"{key} {values.get(key)!r:.99}" for key, known in SUPPORTED.items() if values.get(key) not in known]
    wrong += [key for key in UNSUPPORTED if values.get(key)]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: {wrong[0]} is not supported: only plain LoRA, {', '.join(KINDS)} are")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.setdefault(key, {}) or {}
        try:
            values[key] = {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in patterns.items()}
        except (re.error, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG}: {key} cannot be read ({error})") from None
    return values


def open_authors_weights(folder: Path) -> dict[str, LazyTensor]:
    path = folder / AUTHORS_WEIGHTS
    return open_tensors(path, PREFIX) if path.exists() else {}


def read_tensors(path: Path, tensors: list[tuple[str, LazyTensor]]) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """A and B by the path of their layer, and all other tensors by their name in the base, in float32."""
    pairs, whole = {}, {}
    for name, lazy in tensors:
        if lazy.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {lazy.dtype}, should be {', '.join(FLOATS)}")
        tensor = lazy.read().float()
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
        name = re.sub(r"modules_to_save\.(default\.)?", "", name.removeprefix(PREFIX))
        found = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", name)
        store, key = (pairs.setdefault(found[1], {}), found[2]) if found else (whole, name)
        if key in store:
            raise ValueError(f"{path}: {name} given twice")
        store[key] = tensor
    return pairs, whole


def read_layer(path: Path, name: str, pair: dict[str, torch.Tensor], values: dict, layout: Layout) -> dict:
    """Adapter.lora of a layer. If the file has one matrix for q, k and v, B is cut in three and A is shared."""
    rank = layer_value(values, "r", "rank_pattern", name)
    alpha = layer_value(values, "lora_alpha", "alpha_pattern", name)
    lengths, dora = pair.pop("magnitude_vector", None), values.get("use_dora") is True
    if (lengths is not None) != dora:
        raise ValueError(f"{path}: use_dora is {dora}, and {name} has {'no ' * dora}lora_magnitude_vector")
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{path}: {name} lacks lora_{'A' if 'B' in pair else 'B'}")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] == rank:
        raise ValueError(f"{path}: {name} holds {list(a.shape)} and {list(b.shape)}, its rank is {rank} in {CONFIG}")
    scale = lora_scale(rank, alpha, values.get("use_rslora") is True)
    if dora and lengths.shape != b.shape[:1]:
        raise ValueError(f"{path}: {name} has {list(lengths.shape)} lengths for {len(b)} rows")
    ours, _ = match(f"{name}.weight", layout)  # A and B are never transposed, even if the base's matrix is
    own = lengths.chunk(len(ours)) if dora else [None] * len(ours)
    parts = zip(ours, b.chunk(len(ours)), own)
    return {target.removesuffix(".weight"): (a, part, scale, m) for target, part, m in parts}


def layer_value(values: dict, key: str, patterns: str, name: str) -> float:
    """Rank or alpha of a layer, from the first pattern that matches, else from `key`. Raises ValueError."""
    value = next((value for pattern, value in values[patterns].items() if pattern.match(name)), values.get(key))
    if not isinstance(value, (int, float)) or not 0 < value < 2**31:
        raise ValueError(f"{CONFIG}: {key} of {name} is {value!r}")
    return value


def read_base_sample(path: Path) -> dict[str, list[float]]:
    """The base's weights that save_adapter stored, by the path of their layer; empty if the file has none."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("base", "{}")
    try:
        return {name: [float(n) for n in numbers] for name, numbers in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: its sample of the base's weights cannot be read") from None


# ---------------------------------------------------------------------------------------------------------------------
# attaching to a base


@torch.no_grad()
def attach(model: Llava, adapter: Adapter):
    """Add an adapter to its base. Raises ValueError if it belongs to another base; the model is then unchanged."""
    check_base(model, adapter)
    placeholder_has_row = model.config.image_token_index < model.config.text_config.vocab_size
    grow_vocabulary(model, adapter_vocabulary(adapter), step=1)
    if not placeholder_has_row:  # its id is still the first that no token has
        model.config.image_token_index = model.config.text_config.vocab_size
    untie_head(model, adapter)
    dtype, parameters = model.dtype, dict(model.named_parameters())  # names as they are before layers are wrapped
    for path, (a, b, scale, lengths) in adapter.lora.items():
        layer = (LoRALinear if lengths is None else DoRALinear)(model.get_submodule(path), len(a), scale)
        for half, values in ((layer.lora_A, a), (layer.lora_B, b)):
            half.weight.copy_(values)
            half.to(dtype)
        if lengths is not None:
            layer.lora_magnitude_vector.copy_(lengths)
        model.set_submodule(path, layer)
    for name, tensor in adapter.replaced.items():
        parameters.get(name, parameters[EMBEDDING]).copy_(tensor)  # a tied head is the embedding
    for name, (ids, tensor) in adapter.rows.items():
        parameters.get(name, parameters[EMBEDDING])[ids] = tensor.to(dtype)
    if adapter.tuning:
        attach_tuning(model, adapter.tuning)
    if adapter.has_template:  # stage 2 may use another template or image mode than the base
        model.config.template, model.config.image_mode = adapter.config.template, adapter.config.image_mode
        model.config.eos_token_ids = sorted({*model.config.eos_token_ids, *adapter.config.eos_token_ids})
    if adapter.config and adapter.config.lora_images_only:
        model.config.lora_images_only = True
        ImageRows(model)


def adapter_vocabulary(adapter: Adapter) -> int:
    """The number of embedding rows that an adapter needs: it may have been trained with a vocabulary that grew."""
    rows = [len(tensor) for name, tensor in adapter.replaced.items() if name in (EMBEDDING, HEAD)]
    return max(rows + [max(ids) + 1 for ids, _ in adapter.rows.values() if ids], default=0)


def untie_head(model: Llava, adapter: Adapter):
    """Give the head a weight of its own if an adapter replaces it or the embedding alone, as peft does."""
    embedding, head = adapter.replaced.get(EMBEDDING), adapter.replaced.get(HEAD)
    same = embedding is not None and head is not None and torch.equal(embedding, head)
    if model.config.text_config.tie_word_embeddings and not (embedding is head is None or adapter.tied or same):
        model.config.text_config.tie_word_embeddings = False
        model.language_model.lm_head.weight = nn.Parameter(model.language_model.lm_head.weight.clone())


def check_base(model: Llava, adapter: Adapter):
    """Raise ValueError if the model lacks a part of the adapter, or if shapes or the weights of the base differ."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | NF4Linear):
            shapes[path] = (module.out_features, module.in_features)
    shapes["language_model.lm_head"] = "unsupported"
    for name in (EMBEDDING, HEAD):  # which may grow; a tied head is the embedding
        rows, width = shapes.get(name, shapes[EMBEDDING])
        shapes[name] = max(rows, adapter_vocabulary(adapter)), width
    wanted = {path: (len(b), a.shape[1]) for path, (a, b, *_) in adapter.lora.items()}
    wanted |= {name: tuple(tensor.shape) for name, tensor in adapter.replaced.items()}
    wanted |= {name: (shapes[name][0], tensor.shape[1]) for name, (_, tensor) in adapter.rows.items() if name in shapes}
    wanted |= dict.fromkeys(adapter.rows.keys() - {EMBEDDING, HEAD}, "an embedding or a head")
    differ = [name for name in wanted if shapes.get(name) != wanted[name]]
    wrong = [f"{name} is {shapes.get(name, 'missing')}, should be {wanted[name]}" for name in differ]
    wrong += find_differences(model, adapter.tuning) if adapter.tuning else []
    wrong += [f"{name} is missing" for name in adapter.base_sample if name not in shapes]
    if wrong:
        raise ValueError(f"{adapter.folder} is for another base: {len(wrong)} parts differ: {'; '.join(wrong[:3])}")
    for path, expected in adapter.base_sample.items():
        found, expected = torch.tensor(sample_weights(model, [path])[path]), torch.tensor(expected)
        # NF4 changes weights by 0.1, bfloat16 by 0.002; another model is 1.4 away.
        if found.shape != expected.shape or not torch.dist(found, expected) < 0.3 * expected.norm():
            raise ValueError(f"{adapter.folder} was trained on another base: its {path} held other weights")


def load_with_adapter(
    folder: Path, adapter: Path | None, device: str, dtype: torch.dtype | None,
    bits: int = 16, vision: Path | None = None,
) -> tuple[Llava, Tokenizer]:  # fmt: skip
    """Load a model and its tokenizer for inference, with an adapter if one is given.

    Args: folder: of the base, or of an adapter, whose config then names the base; bits: 4 keeps the matrices of the
    decoder's layers in NF4; vision: CLIP's folder, for an adapter of LLaVA's authors, whose base is a decoder alone.
    """
    if adapter is None and is_adapter(folder):
        adapter, folder = folder, base_of_adapter(folder)
    if adapter is None:
        return load_checkpoint(folder, device, dtype, bits=bits, copy=False)
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter: --model is the base below {adapter}")
    found = read_adapter(adapter, vision)
    if found.sha256 in merged_adapters(folder):
        raise ValueError(f"{folder} has {adapter} in its weights already")
    config, tensors = open_model(folder, vision)
    if config.vision_config is None and found.config is not None and found.config.vision_config is not None:
        # An adapter of LLaVA's authors: its base is the decoder alone, and the adapter's folder has the projector.
        found.config.text_config, found.config.image_token_index = config.text_config, config.image_token_index
        config, tensors = found.config, tensors | open_authors_weights(adapter)
    model = build_model(config, tensors, folder, device, dtype, vision, bits=bits, copy=False)
    attach(model, found)
    return model, load_tokenizer(adapter if find_vocabulary(adapter) else folder, config)


def base_of_adapter(folder: Path) -> Path:
    """The base folder that an adapter's config names. Raises ValueError if it does not exist."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or len(base) > 4000 or "\0" in base or not (Path(base) / "config.json").exists():
        raise ValueError(f"{folder}: an adapter whose base {base!r:.99} is no folder here: give it with --model")
    return Path(base)
