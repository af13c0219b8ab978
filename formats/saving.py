"""Save models in the layout of transformers, in safetensors files that transformers loads."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from formats import nf4_files
from formats.configs import config_to_json, write_processor
from formats.layouts import HEAD, Layout, gpt2, llama, pattern_of
from inputs.files import publish_folder, read_json, write_json
from inputs.tokenizer import Tokenizer
from llava import Llava
from lora import NF4Linear

MERGED = "merged.json"  # names the adapters whose updates are in a model's weights
SHARD_BYTES = 5_000_000_000  # of a file that is written; larger ones are unwieldy to copy


def save_model(model: Llava, folder: str | Path, weights: dict[str, torch.Tensor] | None = None):
    """Write config.json and model.safetensors (in shards, if large) as transformers' own classes load them.

    A LLaVA of the LLaMA family with the mlp2x_gelu projector is a LlavaForConditionalGeneration, a decoder alone a
    LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or GPT2LMHeadModel.

    Args: weights: what its parameters are, by name, where the model itself holds them narrowed or in slices.
    """
    folder, config = Path(folder), model.config
    weights = model.state_dict() if weights is None else weights
    state = {key: value.detach().contiguous() for key, value in weights.items()}
    quantized = quantized_state(model, state)
    if config.text_config.tie_word_embeddings:
        state.pop(HEAD, None)  # the same tensor as the embedding; stored once
    if config.vision_config is None:
        state = rename_back(state, gpt2("transformer.") if config.text_config.gpt2 else llama("model.", ""))
    write_shards(state, folder)
    write_json(folder / "config.json", config_to_json(config) | quantized)
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    write_json(folder / "generation_config.json", ends)
    if config.vision_config is not None:
        write_processor(config, folder)


def publish_model(model: Llava, tokenizer: Tokenizer, target: Path, merged: list[str]):
    """Make a model's folder appear whole. Args: merged: hashes of the adapters that it has in its weights."""

    def write(folder: Path):
        save_model(model, folder)
        tokenizer.save(folder)
        if merged:
            write_json(folder / MERGED, {"adapters": merged})

    publish_folder(target, write)


def merged_into(folder: Path) -> list[str]:
    """Hashes of the adapters that a model has in its weights."""
    return read_json(folder / MERGED).get("adapters", []) if (folder / MERGED).exists() else []


def quantized_state(model: Llava, state: dict[str, torch.Tensor]) -> dict:
    """Put what bitsandbytes writes of a layer in NF4 in the place of ours, and return what config.json says of it."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        return {}
    if model.config.text_config.gpt2:
        raise ValueError("a GPT-2 cannot be written in four bits: its files hold q, k and v in one")
    for path, layer in layers.items():
        for name, _ in layer.named_parameters():
            if name != "bias":
                state.pop(f"{path}.{name}")
        state |= nf4_files.to_files(f"{path}.weight", layer)
    values = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    values |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
    values |= {"bnb_4bit_use_double_quant": all(hasattr(layer, "nested_absmax") for layer in layers.values())}
    values |= {"bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch.")}
    values |= {"llm_int8_skip_modules": ["vision_tower", "multi_modal_projector", "lm_head"]}
    return {"quantization_config": values}


def rename_back(state: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """The same tensors under the names of a layout, parts joined."""
    renamed = {}
    for theirs, ours, change in layout:
        pattern = pattern_of(ours[0])
        for found in filter(None, map(pattern.fullmatch, state)):
            parts = tuple(state[name.format(**found.groupdict())] for name in ours)
            renamed[theirs.format(**found.groupdict())] = change.join(parts).contiguous()
    return renamed


def write_shards(state: dict[str, torch.Tensor], folder: Path):
    """model.safetensors; or model-00001-of-00003.safetensors and so on, with an index."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
