"""GGUF files for tests: a small random decoder of ours with the names, order of rows and metadata of llama.cpp."""

import re

import numpy as np
import pytest
import torch
from test_llava import randomized

from inputs.bpe import ByteLevel
from inputs.files import read_json
from inputs.tokenizer import Tokenizer, train_bpe
from inputs.vocabularies import SPLIT_DIGITS, SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2
from llava import Llava, LlavaConfig, TextConfig

SPLITS = {"gpt-2": SPLIT_GPT2, "smollm": SPLIT_DIGITS, "llama-bpe": SPLIT_LLAMA3, "qwen2": SPLIT_QWEN2}
TEXTS = ["It's 12:30, and the cat isn't on the mat.", "Where is the  cat?\n\nIt sat on  the mat in 2024."] * 3
THEIRS = {  # names of a layer's tensors: ours -> llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 500_000.0, "rms_norm_eps": 1e-4}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}{% endif %}"
CHATML += "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def small_tokenizer(pre="smollm", merges=60):
    """A byte-level vocabulary with the special tokens of ChatML and one added word."""
    trained = train_bpe(TEXTS, merges)
    tokenizer = Tokenizer(ByteLevel(trained.codec.ranks, SPLITS[pre], pre == "qwen2"), trained.specials, trained.roles)
    for name in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_special(name)
    return tokenizer


def tokenizer_values(tokenizer, pre, folder):
    """The metadata of a tokenizer, taken from the tokenizer.json that we write."""
    tokenizer.save(folder)
    content = read_json(folder / "tokenizer.json")
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "add_bos_token": False}
    values["token_type"] = [3 if token in tokenizer.specials else 1 for token in tokens]
    values["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "padding_token_id": tokenizer.pad_id}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": CHATML}


def small_model(kind="llama", tied=False, vocab=None, **shape):
    """A random decoder of ours."""
    size = vocab or small_tokenizer().vocab_size
    text = TextConfig(size, **SHAPE | shape, model_type=kind, qkv_bias=kind == "qwen2", tie_word_embeddings=tied)
    model = randomized(Llava(LlavaConfig(text, image_token_index=size, template="raw")), 0.3)
    if tied:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    return model


def model_values(model):
    """The metadata of a decoder's shape."""
    text = model.config.text_config
    values = {"block_count": text.num_hidden_layers, "embedding_length": text.hidden_size}
    values |= {"feed_forward_length": text.intermediate_size, "context_length": text.max_position_embeddings}
    values |= {"attention.head_count": text.num_attention_heads, "attention.key_length": text.head_dim}
    values |= {"attention.head_count_kv": text.num_key_value_heads, "attention.value_length": text.head_dim}
    values |= {"attention.layer_norm_rms_epsilon": text.rms_norm_eps, "rope.freq_base": text.rope_theta}
    return {f"{text.model_type}.{key}": value for key, value in values.items()}


def model_tensors(model):
    """Every tensor by its name in a GGUF, float32. Queries and keys are permuted as llama.cpp's converter does it."""
    text, found = model.config.text_config, {}
    for name, value in model.language_model.state_dict().items():
        value = value.detach().numpy()
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            fixed = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            name = fixed[name.removeprefix("model.").removesuffix(".weight")] + ".weight"
            if name == "output.weight" and text.tie_word_embeddings:
                continue
        else:
            name = f"blk.{layer[1]}.{THEIRS[layer[2]]}.{layer[3]}"
            heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads}.get(layer[2][-6:-5])
            if heads and text.model_type == "llama":
                value = value.reshape(heads, 2, text.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        found[name] = value
    return found


def write_gguf(path, values, tensors, kind="F32"):
    """Write a file with llama.cpp's own package. Values of None are left out; matrices are quantized to `kind`."""
    gguf = pytest.importorskip("gguf")
    values = {key: value for key, value in values.items() if value is not None}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        types = gguf.GGUFValueType
        sub_type = types.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, types.get_type(value), sub_type)
    for name, value in tensors.items():
        format_of = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), format_of), raw_dtype=format_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model=None, kind="F32", pre="smollm", drop=(), tensors=None, **changes):
    """Write a decoder with a tokenizer. Args: drop: names of tensors; tensors, changes: replace what is written."""
    model = model or small_model()
    scratch = path.parent / f"{path.stem}-tokenizer"
    scratch.mkdir(exist_ok=True)
    values = {"general.architecture": model.config.text_config.model_type} | model_values(model)
    values |= tokenizer_values(small_tokenizer(pre), pre, scratch) | changes
    found = model_tensors(model) | (tensors or {})
    return write_gguf(path, values, {name: value for name, value in found.items() if name not in drop}, kind)


def their_model(path):
    """The model as transformers reads the file."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return theirs.eval()


def their_tokenizer(path):
    """The tokenizer as transformers reads the file."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
