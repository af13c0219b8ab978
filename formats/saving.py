"""Save models in the layout of transformers: config.json, safetensors files, and the processor's files."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from formats import nf4_files
from formats.chat_templates import write_chat_template
from formats.configs import config_to_json
from formats.layouts import HEAD, gpt2, llama, to_layout
from formats.processors import write_processor
from inputs.files import publish_folder, read_optional_json, write_json
from inputs.tokenizer import Tokenizer
from llava import Llava
from lora import NF4Linear

MERGED = "merged.json"  # lists the adapters that were merged into a model's weights
GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000  # larger files are unwieldy to copy


def save_model(
    model: Llava, folder: str | Path, weights: dict[str, torch.Tensor] | None = None, source: Path | None = None
):
    """Write config.json and model.safetensors (in shards, if large) for transformers' own classes.

    A LLaVA of the LLaMA family with the mlp2x_gelu projector loads as LlavaForConditionalGeneration, a decoder alone
    as LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or GPT2LMHeadModel.
    Args: weights: parameters by name; needed if the model itself holds them sharded or in a narrower dtype; source: the
    folder that the model was made from, whose chat template and generation defaults are kept.
    """
    folder, config = Path(folder), model.config
    weights = model.state_dict() if weights is None else weights
    state = {key: value.detach().contiguous() for key, value in weights.items()}
    quantization = quantize_state(model, state)
    if config.text_config.tie_word_embeddings:
        state.pop(HEAD, None)  # the same tensor as the embedding; stored once
    if config.vision_config is None:
        state = to_layout(state, gpt2("transformer.") if config.text_config.gpt2 else llama("model.", ""))
    write_shards(state, folder)
    write_json(folder / "config.json", config_to_json(config) | quantization)
    defaults = read_optional_json(source / GENERATION) if source else {}
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    write_json(folder / GENERATION, defaults | ends)
    write_chat_template(config, folder, source)
    if config.vision_config is not None:
        write_processor(config, folder)


def publish_model(model: Llava, tokenizer: Tokenizer, target: Path, source: Path, *adapters: str):
    """Write a model and its tokenizer; the folder appears complete or not at all. Args: source: see save_model;
    adapters: further ones in its weights, see merged_adapters."""
    merged = [*merged_adapters(source), *adapters]

    def write(folder: Path):
        save_model(model, folder, source=source)
        tokenizer.save(folder)
        if merged:
            write_json(folder / MERGED, {"adapters": merged})

    publish_folder(target, write)


def merged_adapters(folder: Path) -> list[str]:
    """SHA-256 of the weights file of every adapter that was merged into the model in `folder`."""
    return read_optional_json(folder / MERGED).get("adapters", [])


def quantize_state(model: Llava, state: dict[str, torch.Tensor]) -> dict:
    """Replace the tensors of NF4 layers in `state` by those of bitsandbytes' format.

    Returns the addition to config.json, empty if no layer is in NF4.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        return {}
    if model.config.text_config.gpt2:
        raise ValueError("a GPT-2 cannot be written in four bits: its files hold q, k and v as one matrix")
    for path, layer in layers.items():
        for name in dict(layer.named_parameters()).keys() - {"bias"}:
            state.pop(f"{path}.{name}")
        state |= nf4_files.to_files(f"{path}.weight", layer)
    values = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    values |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
    values |= {"bnb_4bit_use_double_quant": all(hasattr(layer, "nested_absmax") for layer in layers.values())}
    values |= {"bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch.")}
    whole = ["vision_tower", "multi_modal_projector"]  # with "model." in transformers 5, without it in 4
    values |= {"llm_int8_skip_modules": [*whole, *(f"model.{name}" for name in whole), "lm_head"]}
    return {"quantization_config": values}


def write_shards(state: dict[str, torch.Tensor], folder: Path):
    """Write model.safetensors, or above SHARD_BYTES several files and their index."""
    shards = [{}]
    for name, tensor in state.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    files = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
