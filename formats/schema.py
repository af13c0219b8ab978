"""Check type and range of every number in a config.json before a model is built from it."""

from dataclasses import fields

LIMITS = {  # field: type, smallest and largest value
    "vocab_size": (int, 1, 1 << 24),
    "hidden_size": (int, 1, 1 << 17),
    "intermediate_size": (int, 1, 1 << 20),
    "num_hidden_layers": (int, 1, 1000),  # every layer is a Python object: a billion of them would fill the memory
    "num_attention_heads": (int, 1, 1 << 12),
    "num_key_value_heads": (int, 1, 1 << 12),
    "head_dim": (int, 1, 1 << 12),
    "max_position_embeddings": (int, 1, 1 << 30),
    "image_size": (int, 1, 1 << 14),
    "patch_size": (int, 1, 1 << 14),
    "projection_dim": (int, 1, 1 << 17),
    "vision_feature_layer": (int, -1001, 1000),
    "image_token_index": (int, 0, 1 << 24),
    "pad_token_id": (int, 0, 1 << 24),
    "rms_norm_eps": (float, 0, 1),
    "layer_norm_eps": (float, 0, 1),
    "rope_theta": (float, 1, 1e15),
    "tie_word_embeddings": (bool, False, True),
    "attention_bias": (bool, False, True),
}


def known_fields(cls, values: dict) -> dict:
    """The entries of a config.json that are not null and are fields of the dataclass `cls`.

    Raises ValueError on a value outside its LIMITS.
    """
    names = {f.name for f in fields(cls)}
    result = {key: value for key, value in values.items() if key in names and value is not None}
    for key in result.keys() & LIMITS.keys():
        (kind, least, most), value = LIMITS[key], result[key]
        is_kind = type(value) is kind or (kind is float and type(value) is int)
        if not is_kind or not least <= value <= most:
            raise ValueError(f"config.json: {key} is {value!r:.99}, not {kind.__name__} from {least} to {most}")
    return result


def check_supported(values: dict, supported: dict):
    """Raise ValueError if a value differs from the only supported one; a missing key and null are fine."""
    for key, only in supported.items():
        if values.get(key) not in (None, only):
            raise ValueError(f"config.json: {key} is {values[key]!r:.99}, and only {only!r} is supported")
