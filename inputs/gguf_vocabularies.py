"""Read the tokenizer in a GGUF file: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

The readers do not catch the errors of malformed files: Tokenizer.load turns them into one line with the file's name.
Source: docs/gguf.md of ggml-org/ggml; the cuts of text are those of the vocabularies' own tokenizer.json.
"""

from pathlib import Path
from typing import Any

import numpy as np

from inputs import vocabularies
from inputs.added_tokens import AddedToken
from inputs.bpe import SPACE, Codec
from inputs.gguf_files import read_gguf
from inputs.vocabularies import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

NAMES = "tokenizer.ggml."  # the prefix of all keys
ROLE_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}
ROLE_IDS |= {"unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
LLAMA_3 = (vocabularies.SPLIT_LLAMA3, None, True)
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> pattern that cuts text, normalizer, whether texts start with a begin token
    "gpt-2": (vocabularies.SPLIT_GPT2, None, False),
    "smollm": (vocabularies.SPLIT_DIGITS, None, False),
    "qwen2": (vocabularies.SPLIT_QWEN2, {"type": "NFC"}, False),
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
}


def read_gguf_vocabulary(path: Path) -> tuple[Codec, dict[str, AddedToken], dict, str | None]:
    """Read the tokenizer of a GGUF file. Returns the same as vocabularies.read_vocabulary. Raises ValueError."""
    metadata = read_gguf(path).metadata
    values = {key.removeprefix(NAMES): value for key, value in metadata.items() if key.startswith(NAMES)}
    model = values.get("model", "none")
    if model not in ("gpt2", "llama"):
        reason = "there is none" if model in ("none", "no_vocab") else f"tokenizer.ggml.model is {model!r:.99}"
        raise ValueError(f"{reason}; gpt2 and llama are supported")
    for key, kind in (("tokens", list), ("merges", list) if model == "gpt2" else ("scores", np.ndarray)):
        if not isinstance(values.get(key), kind):
            raise ValueError(f"no tokenizer.ggml.{key}")
    tokens, settings = values["tokens"], {}
    kinds = values["token_type"].tolist() if "token_type" in values else [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(values.get("scores", tokens)) != len(tokens):
        raise ValueError(f"{len(tokens):,} tokens, but another number of scores or types")
    for role, key in ROLE_IDS.items():
        if (i := values.get(key)) is not None:
            if type(i) is not int or not 0 <= i < len(tokens):
                raise ValueError(f"{key} is {i!r:.99}, and there are {len(tokens):,} tokens")
            settings[role] = tokens[i]
            kinds[i] = kinds[i] if kinds[i] in (UNKNOWN, CONTROL) else UNKNOWN if role == "unk_token" else CONTROL
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token is given twice")
    if model == "llama":
        codec, added = read_pieces(values, tokens, kinds)
        adds_bos = values.get("add_bos_token", True)
    else:
        codec, added, adds_bos = read_byte_level(values, tokens, kinds)
    return codec, added, settings, settings.get("bos_token", "") if adds_bos else ""


def read_pieces(values: dict[str, Any], tokens: list[str], kinds: list[int]) -> tuple[Codec, dict[str, AddedToken]]:
    """SentencePiece's codec and its added tokens."""
    scheme = "prepend" if values.get("add_space_prefix", True) else "never"
    codec = vocabularies.from_pieces(list(zip(tokens, values["scores"].tolist(), kinds)), scheme)
    words = [token.replace(SPACE, " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, kinds)]
    return codec, added_tokens(words, kinds)


def read_byte_level(
    values: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[Codec, dict[str, AddedToken], bool]:
    """The codec of byte-level BPE, its added tokens, and whether a begin token stands in front of a text."""
    name = values.get("pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r:.99}, none of {', '.join(PRE_TOKENIZERS)}")
    pattern, normalizer, adds_bos = PRE_TOKENIZERS[name]
    added = added_tokens(tokens, kinds)
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    # LLaMA-3 encodes a whole word that is a token without merging; some of its tokens cannot be merged.
    model = {"vocab": vocabulary, "merges": values["merges"], "ignore_merges": pattern == vocabularies.SPLIT_LLAMA3}
    section = vocabularies.split_section(pattern, bool(values.get("add_space_prefix", False)))
    codec, _ = vocabularies.parse_json({"normalizer": normalizer, "pre_tokenizer": section, "model": model}, added)
    return codec, added, values.get("add_bos_token", adds_bos)


def added_tokens(tokens: list[str], kinds: list[int]) -> dict[str, AddedToken]:
    """Control tokens, which are special, and user-defined ones, which are words found whole in a text."""
    special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    return {
        token: AddedToken(i, special[kind]) for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in special
    }
