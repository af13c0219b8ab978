"""Checkpoints: we load what transformers writes, it loads what we write, and malformed files are refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prompts import prompt_ids
from safetensors.torch import load_file, save_file
from test_chat_templates import CHAT_TEMPLATES
from test_llava import (
    IMAGE,
    KINDS,
    PAD,
    SHAPE,
    VISION,
    close,
    logits_of,
    make,
    prompt,
    random_ids,
    random_images,
    randomized,
)

import sample
import train
from data import image_pixels
from formats import __main__ as formats_cli
from formats import configs, layouts, saving, weights
from formats.configs import read_config
from formats.processors import clip_preprocessing
from formats.saving import save_model
from formats.weights import load_clip, load_model
from inputs.images import open_image
from inputs.tokenizer import Tokenizer
from llava import Llava, LlavaConfig, TextConfig, generate

DATA = Path(os.environ.get("LLAVA_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
STORIES = DATA / "stories260K"
here = pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not here (LLAVA_DATA names the folder)")


def greedy(model, prompts, features=None, count=64):
    """Greedy answers. End tokens are switched off, as random weights produce them by chance."""
    model.config.eos_token_ids = []
    steps = list(generate(model, prompts, features, max_new_tokens=count))
    return [list(row) for row in zip(*steps)]


# ---------------------------------------------------------------------------------------------------------------------
# a real checkpoint


@here
def test_stories260k_generates_the_documented_text(command, capsys):
    golden = json.loads((STORIES / "golden_stories260K.json").read_text())
    flags = ["--model", STORIES, "--prompt", "", "--device", "cpu", "--json"]
    command(sample, *flags, "--max-new-tokens", len(golden["greedy_token_ids"]) - 1)
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == golden["greedy_text"] and told["prompt_ids"] + told["ids"] == golden["greedy_token_ids"]


@here
def test_stories260k_logits_without_the_cache():
    golden = json.loads((STORIES / "golden_stories260K.json").read_text())
    model, ids = load_model(STORIES), golden["greedy_token_ids"]
    logits = logits_of(model, torch.tensor([ids]))[0]
    assert logits[:-1].argmax(-1).tolist() == ids[1:]
    for check in golden["logit_checks"]:
        row = logits[check["prefix_len"] - 1]
        assert row.argmax().item() == check["argmax"]
        torch.testing.assert_close(row[:8], torch.tensor(check["logits_first8"]), atol=1e-4, rtol=0)
        assert abs(row.logsumexp(0).item() - check["logsumexp"]) < 1e-4


@here
def test_stories260k_after_conversion_is_the_same_model(tmp_path, command):
    command(formats_cli, "convert", STORIES, tmp_path / "stories")
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    again = load_model(tmp_path / "stories")
    assert torch.equal(logits_of(again, ids), logits_of(load_model(STORIES), ids)) and again.config.template == "raw"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stories").eval()
    with torch.no_grad():
        close(logits_of(again, ids), theirs(ids).logits)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "stories")
    assert theirs.encode("Once upon a time") == [1, 403, 407, 261, 378]


@here
@pytest.mark.parametrize("damage", ["cut", "longer", "header"])
def test_damaged_llama2c_file_is_refused(damage, tmp_path):
    data = (STORIES / "stories260K.bin").read_bytes()
    data = {"cut": data[:-4], "longer": data + b"1234", "header": b"\xff" * 28 + data[28:]}[damage]
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.bin"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# decoders that transformers wrote

FAMILIES = ("llama", "llama_tied", "llama3", "mistral", "qwen2", "gpt2")


def theirs_of(kind):
    """A randomly filled model of transformers' own class."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=128)
        return randomized(transformers.GPT2LMHeadModel(config), 0.4)
    family = {"qwen2": "Qwen2", "mistral": "Mistral"}.get(kind, "Llama")
    values = {k: v for k, v in KINDS[kind].items() if k not in ("model_type", "qkv_bias")}
    config = getattr(transformers, f"{family}Config")(**SHAPE | values | {"max_position_embeddings": 128})
    return randomized(getattr(transformers, f"{family}ForCausalLM")(config), 0.4)


def their_greedy(theirs, rows, count, **inputs):
    """Greedy answers of transformers, one prompt at a time, without end tokens."""
    found = []
    for i, ids in enumerate(rows):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        one |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        limits = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": PAD}
        with torch.no_grad():
            found.append(theirs.generate(**one, **limits, eos_token_id=None)[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoder_saved_by_transformers(kind, tmp_path):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # so small that there are several files and an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_model(tmp_path)
    with torch.no_grad():
        close(logits_of(ours, random_ids(2, 17)), theirs(random_ids(2, 17)).logits)
    rows = [random_ids(length, seed=seed).tolist() for seed, length in enumerate((5, 17, 11))]
    want = their_greedy(theirs, rows, 64)
    assert greedy(ours, rows) == want and len({token for row in want for token in row}) > 12


@pytest.mark.parametrize("kind", FAMILIES)
def test_saving_for_transformers_and_loading_again_is_bitwise(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make(kind, decoder_only=True)
    for folder in ("ours", "theirs", "again"):
        (tmp_path / folder).mkdir()
    save_model(ours, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    want, got = ours.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


def test_large_model_is_saved_in_shards(tmp_path, monkeypatch):
    ours = make("llama_tied")
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    save_model(ours, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.tensor([prompt(15, 1)])
    with torch.no_grad():
        close(logits_of(ours, ids, random_images(1)), theirs(input_ids=ids, pixel_values=random_images(1)).logits)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA in every layout

PREFIXES = {  # prefixes of the decoder, its head, the projector, the vision tower
    "hub": ("language_model.model.", "language_model.", "", "vision_tower.vision_model."),
    "saved by 5": ("language_model.model.", "language_model.", "", "vision_tower."),
    "in memory, 4.52": ("model.language_model.", "", "model.", "model.vision_tower.vision_model."),
    "in memory, 5": ("model.language_model.", "", "model.", "model.vision_tower."),
    "authors'": ("model.", "", "model.", "model.vision_tower.vision_tower.vision_model."),
}


def rewrite(state, layout):
    """Tensors of a LLaVA of ours under the names of another layout."""
    body, head, projector, tower = PREFIXES[layout]
    ours = ("language_model.model.", "language_model.", "multi_modal_projector", "vision_tower.vision_model.")
    renamed = {}
    for name, value in state.items():
        if name.startswith(ours[0]):
            name = body + name.removeprefix(ours[0])
        elif name.startswith(ours[1]):
            name = head + name.removeprefix(ours[1])
        elif name.startswith(ours[2]):
            name = projector + name
        else:
            name = tower + name.removeprefix(ours[3])
        if layout == "authors'":
            numbered = "multi_modal_projector.linear_2" in " ".join(state)
            name = name.replace("multi_modal_projector.linear_1", "mm_projector.0" if numbered else "mm_projector")
            name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        renamed[name] = value
    return renamed


def authors_config(config, projector, monkeypatch):
    """config.json as the code of LLaVA's authors writes it. It names the tower, so the test's tower gets a name."""
    monkeypatch.setitem(configs.TOWERS, "tiny-clip", vars(VISION))
    text = {key: value for key, value in vars(config.text_config).items() if key not in ("model_type", "rope_scaling")}
    named = {"mm_vision_tower": "someone/tiny-clip", "mm_hidden_size": 24, "mm_vision_select_layer": -2}
    named |= {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad"}
    return text | named | ({"mm_projector_type": projector} if projector != "linear" else {}) | {"model_type": "llava"}


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_llava_in_every_layout(layout, projector, tmp_path, monkeypatch):
    ours = make("llama_gqa", projector_type=projector)
    save_model(ours, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(rewrite(state, layout), tmp_path / "model.safetensors")
    if layout == "authors'":
        config = authors_config(ours.config, projector, monkeypatch)
        (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_model(tmp_path)
    got = again.state_dict()
    assert got.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, got[key]) for key, value in ours.state_dict().items())
    if layout == "authors'":
        assert again.config.image_mode == "pad" and again.config.template == "vicuna_v1"
        assert again.config.projector_type == projector and again.config.image_token_index == 99
    elif projector == "mlp2x_gelu":
        transformers = pytest.importorskip("transformers")
        theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]  # so the layout is one they know
        ids = torch.tensor([prompt(15, 1)])
        with torch.no_grad():
            want = theirs.eval()(input_ids=ids, pixel_values=random_images(1)).logits
        close(logits_of(again, ids, random_images(1)), want)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_llava_saved_by_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = theirs_of(kind).config
    vision = transformers.CLIPVisionConfig(**{k: v for k, v in vars(VISION).items() if k != "model_type"})
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, pad_token_id=PAD)
    theirs = randomized(transformers.LlavaForConditionalGeneration(config), 0.4)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.config.template, ours.config.image_mode) == ("llava_hf", "square")
    rows = [prompt(length, seed) for seed, length in enumerate((15, 9, 12))]
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(rows[:1]), pixel_values=random_images(1)).logits
    close(logits_of(ours, torch.tensor(rows[:1]), random_images(1)), want)
    theirs.generation_config.suppress_tokens = [IMAGE]
    want = their_greedy(theirs, rows, 64, pixel_values=random_images(3))
    assert greedy(ours, rows, ours.vision_features(random_images(3))) == want
    assert len({i for row in want for i in row}) > 20


def test_projector_file_is_joined_with_decoder_and_clip(tiny, tmp_path, monkeypatch, command, capfd):
    """The authors publish stage 1 as config.json and mm_projector.bin, without decoder and CLIP."""
    ours = make("llama_gqa")
    (tmp_path / "llm").mkdir()
    save_model(Llava(LlavaConfig(ours.config.text_config)), tmp_path / "llm")
    decoder = load_model(tmp_path / "llm")
    decoder.language_model.load_state_dict(ours.language_model.state_dict())
    save_model(decoder, tmp_path / "llm")
    source, clip = tmp_path / "projector", tmp_path / "clip"
    source.mkdir()
    clip.mkdir()
    projector = {k: v for k, v in ours.state_dict().items() if k.startswith("multi_modal_projector")}
    torch.save(rewrite(projector, "authors'"), source / "mm_projector.bin")
    (source / "config.json").write_text(json.dumps(authors_config(ours.config, "mlp2x_gelu", monkeypatch)))
    (clip / "config.json").write_text(json.dumps(vars(VISION)))
    tower = ours.vision_tower.state_dict()
    save_file({key: value.clone() for key, value in tower.items()}, clip / "model.safetensors")
    command(formats_cli, "inspect", source)
    assert "authors'" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"--llm.*--vision"):
        load_model(source)
    again = load_model(source, vision=clip, llm=tmp_path / "llm").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())


def test_llava_without_its_vision_tower(tmp_path, monkeypatch, tiny):
    """liuhaotian/llava-v1.5-7b has no vision tower in its files: it is loaded with CLIP's folder only."""
    ours = load_model(tiny.stage2)
    state = {key: value for key, value in ours.state_dict().items() if "vision_tower" not in key}
    del state[layouts.HEAD]
    tmp_path.joinpath("config.json").write_bytes((tiny.stage2 / "config.json").read_bytes())
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--vision"):
        load_model(tmp_path)
    again = load_model(tmp_path, vision=tiny.clip).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())


SNAPSHOT = "/data/hub/models--{}/snapshots/ce19dc912ca5cd21c8a653c79e251e808ccabcd1"


@pytest.mark.parametrize("tower", [SNAPSHOT.format("someone--clip-l"), "./towers/clip-l-336-medical/", "laion/CLIP"])
def test_vision_tower_of_an_unknown_name_has_the_shape_of_the_clip_given(tower, tmp_path, monkeypatch, command, capfd):
    """A checkpoint names its tower by a path of the machine that trained it."""
    ours, source, clip = make("llama_gqa"), tmp_path / "source", tmp_path / "clip"
    state = rewrite(ours.state_dict(), "authors'")
    values = authors_config(ours.config, "mlp2x_gelu", monkeypatch) | {"mm_vision_tower": tower}
    for folder in (source, clip):
        folder.mkdir()
    (source / "config.json").write_text(json.dumps(values))
    (clip / "config.json").write_text(json.dumps(vars(VISION)))
    save_file({key: value for key, value in state.items() if "vision_tower" not in key}, source / "model.safetensors")
    tensors = {key: value.clone() for key, value in ours.vision_tower.state_dict().items()}
    save_file(tensors, clip / "model.safetensors")
    with pytest.raises(ValueError, match=r"the shape of the vision tower .* is not known.*--vision"):
        load_model(source)
    again = load_model(source, vision=clip).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    assert not capfd.readouterr().err
    # A tower in the checkpoint's own files, perhaps a trained one, is not replaced by the CLIP's.
    save_file(state, source / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, clip / "model.safetensors")
    again = load_model(source, vision=clip).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    assert "its own vision tower is used" in capfd.readouterr().err


def test_vision_tower_in_the_cache_of_the_hub_is_known(tmp_path, monkeypatch):
    values = authors_config(make("llama_gqa").config, "mlp2x_gelu", monkeypatch)
    values["mm_vision_tower"] = SNAPSHOT.format("openai--clip-vit-large-patch14-336")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).vision_config.image_size == 336


def test_vision_tower_with_another_preprocessing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(vars(VISION)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip_preprocessing(8) | {"image_mean": [0.5] * 3}))
    with pytest.raises(ValueError, match="preprocessed with image_mean"):
        configs.read_vision_config(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def openai_names(state):
    """A CLIP's tensors under OpenAI's names: q, k and v joined, the projections transposed."""
    renamed = {}
    for ours, theirs in (("vision_model.", "visual."), ("text_model.", "")):
        width = {"vision_model.": "vision_model.pre_layrnorm", "text_model.": "text_model.final_layer_norm"}[ours]
        assert state[f"{width}.weight"].ndim == 1
        layers = {name.split(".")[3] for name in state if name.startswith(f"{ours}encoder")}
        for n in layers:
            layer, block = f"{ours}encoder.layers.{n}.", f"{theirs}transformer.resblocks.{n}."
            for p in ("weight", "bias"):
                qkv = [state[f"{layer}self_attn.{part}_proj.{p}"] for part in "qkv"]
                renamed[f"{block}attn.in_proj_{p}"] = torch.cat(qkv)
                for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                    renamed[f"{block}{b}.{p}"] = state[f"{layer}{a}.{p}"]
                for a, b in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    renamed[f"{block}{b}.{p}"] = state[f"{layer}{a}.{p}"]
    for p in ("weight", "bias"):
        renamed[f"visual.ln_pre.{p}"] = state[f"vision_model.pre_layrnorm.{p}"]
        renamed[f"visual.ln_post.{p}"] = state[f"vision_model.post_layernorm.{p}"]
        renamed[f"ln_final.{p}"] = state[f"text_model.final_layer_norm.{p}"]
    embeddings = "vision_model.embeddings."
    renamed["visual.class_embedding"] = state[f"{embeddings}class_embedding"]
    renamed["visual.conv1.weight"] = state[f"{embeddings}patch_embedding.weight"]
    renamed["visual.positional_embedding"] = state[f"{embeddings}position_embedding.weight"]
    renamed["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    renamed["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    renamed["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    renamed["text_projection"] = state["text_projection.weight"].T.contiguous()
    return renamed | {"logit_scale": state["logit_scale"], "input_resolution": torch.tensor(8)}


def test_a_text_tower_with_another_activation_is_refused(tiny, tmp_path):
    values = json.loads((tiny.clip / "config.json").read_text())
    values["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="hidden_act is 'gelu', and only 'quick_gelu' is supported"):
        load_clip(tmp_path)


def test_a_tensor_without_a_name_in_the_layout_is_not_dropped():
    state = {"language_model.lm_head.weight": torch.ones(1), "language_model.extra.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 of 2 tensors have no name in this layout: language_model\.extra\.weight"):
        layouts.to_layout(state, layouts.llama("model.", ""))


def test_generation_defaults_are_kept(tiny, tmp_path, command):
    shutil.copytree(tiny.stage2, tmp_path / "a")
    ends = json.loads((tmp_path / "a/generation_config.json").read_text())
    (tmp_path / "a/generation_config.json").write_text(json.dumps(ends | {"temperature": 0.2, "do_sample": True}))
    command(formats_cli, "convert", tmp_path / "a", tmp_path / "b")
    found = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert found == ends | {"temperature": 0.2, "do_sample": True}


def test_a_guessed_image_mode_is_said(tiny, tmp_path, capsys):
    values = json.loads((tiny.stage2 / "config.json").read_text())
    del values["image_mode"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).image_mode == "square"
    assert "no preprocessor_config.json: images are cut to squares" in capsys.readouterr().err
    shutil.copy(tiny.stage2 / "preprocessor_config.json", tmp_path)
    assert read_config(tmp_path).image_mode == "pad" and capsys.readouterr().err == ""


@pytest.mark.parametrize("names", ["Hugging Face", "OpenAI", "old"])
def test_clip_with_every_naming(names, tiny, tmp_path):
    state = load_file(tiny.clip / "model.safetensors")
    want = load_clip(tiny.clip).state_dict()
    (tmp_path / "config.json").write_bytes((tiny.clip / "config.json").read_bytes())
    if names == "OpenAI":
        state = openai_names(state)
    if names == "old":
        state |= {f"{part}.embeddings.position_ids": torch.arange(9)[None] for part in ("text_model", "vision_model")}
    save_file(state, tmp_path / "model.safetensors")
    got = load_clip(tmp_path).state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    model = load_model(tiny.stage1)
    tower = {key: value.clone() for key, value in model.vision_tower.state_dict().items()}
    for p in model.vision_tower.parameters():
        p.data.zero_()
    weights.load_tower(model, tmp_path)
    assert all(torch.equal(tower[key], value) for key, value in model.vision_tower.state_dict().items())


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_vision_tower_saved_by_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in vars(VISION).items() if k != "model_type"}
    config = transformers.CLIPVisionConfig(**values)
    if name == "CLIPModel":
        text = transformers.CLIPTextConfig(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=1)
        config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=config.to_dict())
    theirs = randomized(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    assert configs.read_vision_config(tmp_path).hidden_size == 24
    model = make("llama")
    weights.load_tower(model, tmp_path)
    tower = theirs if name == "CLIPVisionModel" else theirs.vision_model
    with torch.no_grad():
        want = tower(random_images(2), output_hidden_states=True).hidden_states[-2][:, 1:]
        close(model.vision_features(random_images(2)), want)


# ---------------------------------------------------------------------------------------------------------------------
# a new LLaVA from pretrained towers


@pytest.mark.skipif(not (DATA / "tokenizers/llama2").exists(), reason=f"no LLaMA-2 tokenizer in {DATA}")
def test_new_llava_from_clip_and_llama_of_transformers(tiny, tmp_path, command):
    """Stage 1 on towers saved by transformers, with LLaMA-2's tokenizer; transformers loads the result."""
    transformers = pytest.importorskip("transformers")
    for name in ("clip", "llama"):
        (tmp_path / name).mkdir()
    vision = transformers.CLIPVisionConfig(**{k: v for k, v in vars(VISION).items() if k != "model_type"})
    randomized(transformers.CLIPVisionModel(vision)).save_pretrained(tmp_path / "clip")
    text = transformers.LlamaConfig(**SHAPE | {"vocab_size": 32000, "max_position_embeddings": 512})
    theirs = randomized(transformers.LlamaForCausalLM(text))
    theirs.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/tokenizer.model").symlink_to(DATA / "tokenizers/llama2/tokenizer.model")
    flags = ["--vision", tmp_path / "clip", "--llm", tmp_path / "llama", "--world", tiny.world, "--device", "cpu"]
    command(train, "--stage", 1, *flags, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "new")

    ours = load_model(tmp_path / "new")
    assert ours.config.template == "vicuna_v1" and ours.config.eos_token_ids == [2]
    assert (ours.config.image_token_index, ours.config.text_config.vocab_size) == (32000, 32064)
    embedding = ours.language_model.model.embed_tokens.weight
    assert torch.equal(embedding[:32000], theirs.model.embed_tokens.weight)
    assert torch.allclose(embedding[32000:], embedding[:32000].mean(0))
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "new", backend="pil")
    tokenizer = weights.load_tokenizer(tmp_path / "new", ours.config)
    ids = prompt_ids(["What is this?"], [], 1, tokenizer, "llava_hf", 4)
    image = Image.linear_gradient("L").convert("RGB")
    theirs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == ids
    assert ids[:3] == [1, 3148, 1001] and ids[-5:] == [319, 1799, 9047, 13566, 29901]  # as LLaVA's own tokenizer
    with torch.no_grad():
        want = whole(**theirs).logits
    close(logits_of(ours, torch.tensor([ids]), theirs["pixel_values"]), want)


# ---------------------------------------------------------------------------------------------------------------------
# full size, on the meta device


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_shapes_of_llava_15(size, tmp_path):
    """The config.json of llava-hf/llava-1.5-*-hf, which omits most fields, gives transformers' names and shapes."""
    transformers = pytest.importorskip("transformers")
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    if size == "13b":
        text |= {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
        text |= {"num_attention_heads": 40, "num_key_value_heads": 40}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    whole = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "vision_feature_layer": -2}
    whole |= {"vision_feature_select_strategy": "default", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with torch.device("meta"):
        ours = Llava(read_config(tmp_path))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        theirs = transformers.LlavaForConditionalGeneration(config)
    layout = layouts.LLAVA_LAYOUTS["LLaVA, transformers 5 in memory"]
    renamed = {layouts.match(name, layout)[0][0]: shape for name, shape in shapes_of(theirs).items()}
    assert renamed == shapes_of(ours)
    assert sum(p.numel() for p in ours.parameters()) == {"7b": 7_063_427_072, "13b": 13_351_494_656}[size]


# ---------------------------------------------------------------------------------------------------------------------
# malformed files


def header(content, data=b"\0" * 64, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin=0, end=64, shape=(4, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)
MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length 2^63": header({}, length=2**63),
    "length past the end": header({}, length=1000),
    "length of 101 MB": header({}, length=101 * 2**20),
    "not UTF-8": header(b'{"\xff": 1}'),
    "not JSON": header(b"{,}" + b" " * 5),
    "a space in front": header(b" " + json.dumps({"a": entry()}).encode()),
    "a key twice": header(TWICE),
    "overlap": header({"a": entry(0, 64), "b": entry(32, 64, (2, 4))}),
    "a hole": header({"a": entry(0, 32, (2, 4)), "b": entry(48, 64, (1, 4))}),
    "past the end": header({"a": entry(0, 128, (8, 4))}),
    "negative": header({"a": entry(-64, 0)}),
    "size mismatch": header({"a": entry(0, 64, (5, 4))}),
    "shape overflow": header({"a": entry(0, 64, (2**62, 2**62))}),
    "unknown dtype": header({"a": entry(dtype="F33")}),
    "trailing junk": header({"a": entry()}, b"\0" * 64 + b"junk"),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": entry()}),
    "begin after end": header({"a": entry(64, 0)}),
    "data cut off": header({"a": entry()}, b"\0" * 60),
    "deep": header(b"[" * 100_000 + b"]" * 100_000),
    "ten thousand names": header({f"t{i}": entry(0, 0, (0,)) for i in range(10_000)}, b""),
    "not a number": header({"a": entry()}, struct.pack("<f", float("nan")) * 16),
    "a pickle": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_safetensors_are_refused(kind, tmp_path):
    save_model(make("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "not a number":  # a good file, but for one number
        state = load_file(path)
        state["language_model.model.norm.weight"][3] = float("nan")
        save_file(state, path)
    else:
        path.write_bytes(MALFORMED[kind])
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert len(message.splitlines()) == 1 and len(message) < 1000


def test_truncated_file_is_refused(tmp_path):
    save_model(make("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for length in [len(data) * i // 64 for i in range(64)] + [len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError) as caught:
            load_model(tmp_path)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_integer_weights_are_refused(tmp_path):
    """An 8-bit checkpoint has such weights; without their scales they mean nothing."""
    save_model(make("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is int8"):
        load_model(tmp_path)


@pytest.mark.parametrize("key, value", [
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("compression_config", {"quant_method": "compressed-tensors"}),
    ("text_config", {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}),
])  # fmt: skip
def test_quantization_in_a_config_is_named_before_anything_else(key, value, tmp_path, command):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", key: value}))
    with pytest.raises(SystemExit) as caught:
        command(sample, "--model", tmp_path, "--prompt", "What")
    method = value.get("quant_method", "awq")
    assert f"quantized with '{method}'" in caught.value.code and len(caught.value.code.splitlines()) == 1


def test_inspect_shows_a_quantized_folder_before_it_names_the_quantization(tmp_path, command, capsys):
    save_model(make("llama"), tmp_path)
    change_json(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(SystemExit, match="quantized with 'awq'"):
        command(formats_cli, "inspect", tmp_path)
    assert "tensors" in capsys.readouterr().out


def gptq(name, weight):
    """A matrix (out, in) as GPTQ and AWQ store it: eight codes in an int32."""
    shapes = {"qweight": (weight.shape[1] // 8, len(weight)), "qzeros": (1, len(weight) // 8)}
    codes = {name + key: torch.zeros(shape, dtype=torch.int32) for key, shape in shapes.items()}
    return codes | {f"{name}scales": torch.ones(1, len(weight))}


FOREIGN = {  # quantization -> the tensors of one matrix, and words of the refusal
    "GPTQ": (gptq, "GPTQ or AWQ"),
    "int8": (lambda name, w: {f"{name}weight": w.to(torch.int8), f"{name}SCB": torch.ones(len(w))}, "int8"),
    "FP8": (
        lambda name, w: {f"{name}weight": w.to(torch.float8_e4m3fn), f"{name}weight_scale_inv": torch.ones(1, 1)},
        "FP8",
    ),
    "FP8 without scales": (lambda name, w: {f"{name}weight": w.to(torch.float8_e4m3fn)}, "FP8"),
    "compressed": (lambda name, w: {f"{name}weight_packed": w.to(torch.int32)}, "compressed-tensors"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_quantization_of_tensors_is_named(kind, tmp_path):
    """bitsandbytes' config.json stands also beside whole weights, and some folders lack the key: the tensors tell."""
    save_model(make("llama"), tmp_path)
    values = {"quant_method": "bitsandbytes", "load_in_8bit": True} if kind == "int8" else None
    change_json(tmp_path / "config.json", quantization_config=values)
    state, (quantize, words) = load_file(tmp_path / "model.safetensors"), FOREIGN[kind]
    for name in [name for name in state if name.endswith("_proj.weight") and "language_model" in name]:
        state |= quantize(name.removesuffix("weight"), state.pop(name))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="only bitsandbytes' NF4 is read") as caught:
        load_model(tmp_path)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_integers_are_not_called_a_smaller_model(tmp_path):
    save_model(make("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.to(torch.int64) for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is int64, should be float32") as caught:
        load_model(tmp_path)
    assert "belongs to" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "inner"])
def test_wrapped_names_are_unwrapped_and_said_once(prefix, tmp_path, capfd):
    """The names that torch.compile, DDP and peft give to a model's tensors; "inner": only the decoder was compiled."""
    ours = make("llama")
    save_model(ours, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    inner = {name: name.replace("language_model.", "language_model._orig_mod.") for name in state}
    names = inner if prefix == "inner" else {name: prefix + name for name in state}
    save_file({names[name]: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())
    printed = capfd.readouterr().err
    assert printed.count("taken off") == 1 and all(part in printed for part in prefix.split(".") if part != "inner")


def test_two_tensors_of_one_unwrapped_name_are_refused(tmp_path):
    save_model(make("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model._orig_mod.lm_head.weight"] = state["language_model.lm_head.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"one name without _orig_mod\."):
        load_model(tmp_path)


def test_a_lora_beside_its_base_is_named(tmp_path):
    """peft's whole model, saved as a checkpoint: the matrices are under base_layer, beside A and B."""
    save_model(make("llama"), tmp_path)
    state, name = load_file(tmp_path / "model.safetensors"), "language_model.model.layers.0.self_attn.q_proj."
    state[f"{name}base_layer.weight"] = state.pop(f"{name}weight")
    state |= {f"{name}lora_{half}.default.weight": torch.zeros(4, 32) for half in "AB"}
    save_file({f"base_model.model.{key}": tensor for key, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a LoRA beside its base"):
        load_model(tmp_path)


def test_one_of_two_weight_files_is_read_and_named(tmp_path, capfd):
    ours = make("llama")
    save_model(ours, tmp_path)
    torch.save({"language_model.lm_head.weight": torch.zeros(99, 32)}, tmp_path / "pytorch_model.bin")
    load_model(tmp_path)
    assert capfd.readouterr().err == f"{tmp_path}: model.safetensors is read, not pytorch_model.bin\n"


def test_infinity_in_half_precision_is_refused(tmp_path):
    save_model(make("llama").half(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model.lm_head.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight holds numbers that are not finite"):
        load_model(tmp_path)


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A function that changes the index of a sharded model, loads the model and returns the error message."""
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    save_model(make("llama"), tmp_path)
    path = tmp_path / "model.safetensors.index.json"

    def complaint(change):
        index = json.loads(path.read_text())
        changed = change(index)
        path.write_text(json.dumps(index if changed is None else changed))
        with pytest.raises(ValueError) as caught:
            load_model(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    complaint.folder = tmp_path
    return complaint


def test_index_with_a_file_outside_the_folder_is_refused(sharded):
    for outside in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors"):
        assert "leads out of the folder" in sharded(
            lambda index, outside=outside: index["weight_map"].update({next(iter(index["weight_map"])): outside})
        )


def test_missing_shard_is_refused(sharded):
    (sharded.folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    first = sorted(sharded.folder.glob("model-*.safetensors"))[1]
    first.unlink()
    assert "missing" in sharded(lambda index: None)


def test_index_that_lacks_a_tensor_is_refused(sharded):
    assert "not where it says" in sharded(
        lambda index: index["weight_map"].pop("language_model.lm_head.weight") and None
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_a_weight_map_is_refused(sharded, index):
    assert "weight_map" in sharded(lambda _: index)


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    save_model(make("llama_tied"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    load_model(tmp_path)  # an equal head is allowed
    state["language_model.lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="two different ones"):
        load_model(tmp_path)


def test_pickle_is_read_without_running_its_code(tmp_path, capfd):
    ours = make("llama")
    save_model(ours, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    assert "weights_only=True" in capfd.readouterr().err

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(state | {"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "value",
    [torch.ones(1).expand(1 << 16, 1 << 16), torch.ones(2, device="meta"), torch.ones(2).to_sparse()],
    ids=["expanded", "meta", "sparse"],
)
def test_a_pickle_of_tensors_without_their_numbers_is_refused(tmp_path, value):
    ours = make("llama")
    save_model(ours, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(ours.state_dict() | {"x": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'x' is no plain tensor"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# invalid or unsupported configs


def change_json(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        part = values
        *outer, key = key.split("__")
        for name in outer:
            part = part[name]
        part[key] = value
    path.write_text(json.dumps(values))


LINEAR, LLAMA_3 = {"rope_type": "linear"}, {"rope_type": "llama3", "factor": 2.0}
WRONG_FIELDS = [
    *(("num_hidden_layers", value) for value in (10**9, -1, 0, 2.0, True, "2")),
    *(("vocab_size", value) for value in (10**12, -5, 96.0)),
    *(("hidden_size", value) for value in (0, "32", [32])),
    *(("num_attention_heads", value) for value in (0, -4)),
    *(("num_key_value_heads", value) for value in (3, 8)),
    *(("head_dim", value) for value in (7, -8)),
    *(("max_position_embeddings", value) for value in (10**15, -1, 64.5, "128")),
    *(("rms_norm_eps", value) for value in ("1e-5", -1, [1], float("nan"))),
    *(("tie_word_embeddings", value) for value in ("false", 1)),
    *(("template", value) for value in ("nope", ["vicuna_v1"])),
    *(("eos_token_ids", value) for value in (5, [None], ["2"], [True], [-1])),
    *(("pad_token_id", value) for value in (10**9, -2, "0")),
    *(("rope_parameters", value) for value in ([1], LINEAR, LINEAR | {"factor": 0}, LINEAR | {"factor": "2"}, LLAMA_3)),
    *(("rope_parameters", {"rope_type": "default", "rope_theta": theta}) for theta in (-5, "x", 0)),
    ("rope_parameters", {"rope_type": ["a"]}),
    *(("model_type", value) for value in (["a"], 5)),
]
WRONG_OF_A_LLAVA = [
    *(("vision_feature_layer", value) for value in (True, [-2], 5, -6, 1.0)),
    *(("image_token_index", value) for value in (-200, 10**9, 1.5, "x")),
    *(("projector_type", value) for value in ("nope", ["linear"])),
    *(("image_mode", value) for value in ("nope", "anyres")),
    *(("image_grid_pinpoints", value) for value in (5, [5], [[8, 16]])),
    *(("text_config", value) for value in ([], "x", None)),
    *(("vision_config", value) for value in ([], "a", {})),
    *(("vision_config__num_hidden_layers", value) for value in (10**9, 1.5)),
    *(("vision_config__patch_size", value) for value in (0, 9)),
    *(("vision_config__image_size", value) for value in (-8, [8, 8], 10**9)),
    *(("vision_config__num_attention_heads", value) for value in (5, 0)),
    *(("vision_config__layer_norm_eps", value) for value in ("x", -1)),
    ("vision_config__model_type", "siglip_vision_model"),
    ("multimodal_projector_bias", False),
    ("image_token_id", 5),
]


@pytest.mark.parametrize("blind, key, value", [
    *((True, *wrong) for wrong in WRONG_FIELDS), *((False, *wrong) for wrong in WRONG_OF_A_LLAVA)
])  # fmt: skip
def test_invalid_field_of_a_config_is_refused(blind, key, value, tmp_path):
    save_model(make("llama", decoder_only=blind), tmp_path)
    change_json(tmp_path / "config.json", **{key: value})
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_billion_layers_are_refused_at_once(tmp_path, command):
    save_model(make("llama"), tmp_path)
    change_json(tmp_path / "config.json", text_config__num_hidden_layers=10**9)
    with pytest.raises(SystemExit) as caught:
        command(formats_cli, "inspect", tmp_path)
    assert "num_hidden_layers is 1000000000" in caught.value.code


def test_padding_token_of_minus_one_means_none(tmp_path):
    for blind in (True, False):
        save_model(make("llama", decoder_only=blind, pad_token_id=3), tmp_path)
        changes = {"pad_token_id": -1} if blind else {"pad_token_id": -1, "text_config__pad_token_id": -1}
        change_json(tmp_path / "config.json", **changes)
        assert read_config(tmp_path).pad_token_id == 0


OTHER_MODELS = [  # keys that transformers reads and this code does not support
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "tie_word_embeddings", False),
    ("llama", "mlp_bias", True),
]


@pytest.mark.parametrize("kind, key, value", OTHER_MODELS)
def test_unsupported_variant_of_a_decoder_is_refused(kind, key, value, tmp_path):
    save_model(make(kind, decoder_only=True), tmp_path)
    change_json(tmp_path / "config.json", **{key: value})
    with pytest.raises(ValueError, match=key):
        load_model(tmp_path)


def test_attention_bias_counts_only_for_llama(tmp_path):
    for kind in ("mistral", "qwen2"):
        save_model(make(kind, decoder_only=True), tmp_path)
        change_json(tmp_path / "config.json", attention_bias=True)
        load_model(tmp_path)


WINDOWS = [  # decoder, keys in the file, maximal context
    ("mistral", {"sliding_window": None}, 131_072),
    ("mistral", {"sliding_window": 8}, 8),
    ("mistral", {"sliding_window": 8, "use_sliding_window": False}, 8),
    ("mistral", {}, 4096),
    ("qwen2", {"sliding_window": 8}, 32768),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, 8),
    ("qwen2", {"use_sliding_window": True}, 4096),
    ("llama", {"sliding_window": 8, "use_sliding_window": True}, 2048),
]


@pytest.mark.parametrize("kind, values, length", WINDOWS)
def test_sliding_window_limits_the_context(kind, values, length):
    text = configs.read_text_config(values | {"model_type": kind})
    assert text.max_position_embeddings == length


@pytest.mark.parametrize("blind", [True, False])
def test_saved_mistral_has_no_window(blind, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(make("mistral", blind), tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).get_text_config().sliding_window is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_missing_end_token_is_that_of_transformers(kind, tmp_path):
    """Not LLaMA's 2 for all: it is # in GPT-2 and in Qwen2, and would end their answers there."""
    values = {"model_type": kind} | ({} if kind == "gpt2" else SHAPE | {"num_key_value_heads": 2})
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).eos_token_ids == {"gpt2": [50256], "qwen2": []}.get(kind, [2])
    theirs = pytest.importorskip("transformers").AutoConfig.from_pretrained(tmp_path).eos_token_id
    assert read_config(tmp_path).eos_token_ids == ([] if theirs is None else [theirs])


def test_rope_theta_in_both_places_is_read_as_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs_of("llama").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", rope_theta=777.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(logits_of(load_model(tmp_path), random_ids(1, 17)), theirs(random_ids(1, 17)).logits)


def test_tie_word_embeddings_in_one_of_two_places_is_enough(tmp_path):
    ours = make("llama_tied")
    save_model(ours, tmp_path)
    change_json(tmp_path / "config.json", text_config__tie_word_embeddings=False)
    again = load_model(tmp_path)
    assert torch.equal(again.language_model.lm_head.weight, ours.language_model.model.embed_tokens.weight)


# ---------------------------------------------------------------------------------------------------------------------
# the files beside the weights


def processed(side=8, **changes):
    return clip_preprocessing(side) | changes


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessing_other_than_clip_is_refused(file, tmp_path):
    save_model(make("llama"), tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink()
    change_json(tmp_path / "config.json", image_mode=None)

    def read(**values):
        content = {"image_processor": values} if file == "processor_config.json" else values
        (tmp_path / file).write_text(json.dumps(content))
        return read_config(tmp_path).image_mode

    assert read(**processed()) == read(**processed(size=8, crop_size=8)) == read() == "square"
    assert read(**processed(do_pad=True)) == "pad"
    wrong = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_center_crop": False, "size": 9}
    wrong |= {"crop_size": {"height": 9, "width": 9}, "do_normalize": False, "rescale_factor": 1 / 127.5}
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=f"{key}.*only"):
            read(**processed(**{key: value}))
    with pytest.raises(ValueError, match="image_mean"):
        read(**processed(image_mean="red"))


def test_processor_saved_by_transformers_5(tiny, tmp_path):
    """transformers 5 writes the image processor into processor_config.json only."""
    transformers = pytest.importorskip("transformers")
    model = load_model(tiny.stage2)
    model.config.image_mode = "pad"
    save_model(model, tmp_path)
    weights.load_tokenizer(tiny.stage2, model.config).save(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    (tmp_path / "preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    content = json.loads((tmp_path / "config.json").read_text())
    del content["image_mode"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).image_mode == "pad"


AUTHORS = [  # model_type, chat template, our name of it
    ("llava_llama", "", "vicuna_v1"),
    ("llava_mistral", "", "mistral_instruct"),
    ("llava_qwen", "", "qwen_1_5"),
    ("llava_llama", CHAT_TEMPLATES["LLaMA-3"][0], "llava_llama_3"),
    ("llava_llama", CHAT_TEMPLATES["LLaVA-1.6-34B"][0], "chatml"),
    ("llava_llama", CHAT_TEMPLATES["LLaMA-2"][0], "llava_llama_2"),
]


@pytest.mark.parametrize("kind, chat, template", AUTHORS)
def test_template_of_the_authors_models(kind, chat, template, tmp_path, monkeypatch):
    config = authors_config(make("llama_gqa").config, "mlp2x_gelu", monkeypatch) | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
    assert read_config(tmp_path).template == template


@pytest.mark.parametrize("key, value", [("mm_vision_select_layer", [-2, -5]), ("mm_vision_select_layer", -99),
    ("mm_vision_select_layer", True), ("model_type", "llava_mpt"), ("mm_use_im_start_end", True),
    ("mm_vision_select_feature", "cls_patch")])  # fmt: skip
def test_unsupported_options_of_the_authors_are_refused(key, value, tmp_path, monkeypatch):
    config = authors_config(make("llama_gqa").config, "mlp2x_gelu", monkeypatch) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_end_tokens_of_the_template_are_added(tiny, tmp_path):
    """A config.json may name only the token that ends a text, as LLaMA-3's does."""
    tokenizer = Tokenizer.load(tiny.decoder)
    end = tokenizer.add_special("<|eot_id|>")
    model = load_model(tiny.decoder)
    weights.grow_vocabulary(model, tokenizer.vocab_size)
    model.config.template, model.config.eos_token_ids = "llava_llama_3", [tokenizer.eos_id]
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    model, tokenizer = weights.load_checkpoint(tmp_path, "cpu", torch.float32)
    assert model.config.eos_token_ids == sorted([tokenizer.eos_id, end])


@pytest.mark.parametrize("values", [[1], {"num_hidden_layers": 1.5}, {"num_hidden_layers": 10**9}, {"patch_size": 0}])
def test_invalid_field_of_a_clip_is_refused(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": values}))
    with pytest.raises(ValueError) as caught:
        configs.read_vision_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.fixture
def load_changed(tiny, tmp_path):
    """A function that changes the tokenizer and image_token_index of a LLaVA and loads the tokenizer."""

    def load(change, index=None):
        tokenizer, config = Tokenizer.load(tiny.stage2), read_config(tiny.stage2)
        change(tokenizer)
        tokenizer.save(tmp_path)
        config.image_token_index = config.image_token_index if index is None else index
        return weights.load_tokenizer(tmp_path, config)

    return load


def rename_image_token(name):
    """A change that gives the image token another name."""

    def change(tokenizer):
        tokenizer.specials[name] = tokenizer.specials.pop("<image>")
        del tokenizer.roles["image"]

    return change


def test_image_token_is_renamed(load_changed):
    tokenizer = load_changed(rename_image_token("<|reserved_250|>"))
    assert tokenizer.roles["image"] == "<image>" and "<|reserved_250|>" not in tokenizer.specials


@pytest.mark.parametrize("kind", ["ordinary", "another", "the end", "too few rows"])
def test_tokenizer_that_contradicts_the_config_is_refused(kind, load_changed, tmp_path):
    index, change = {
        "ordinary": (5, lambda tokenizer: None),
        "another": (999, lambda tokenizer: tokenizer.add_special("<more>")),
        "the end": (None, rename_image_token("<images>")),
        "too few rows": (None, lambda tokenizer: tokenizer.specials.update({"<more>": 5000})),
    }[kind]
    if kind == "the end":
        index = load_changed(lambda tokenizer: None).eos_id
    with pytest.raises(ValueError) as caught:
        load_changed(change, index)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_most_common_dtype_is_kept(tmp_path, capfd):
    """Computed tables of old files and a single tensor of another dtype do not count."""
    save_model(make("llama", decoder_only=True).half(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {"a.rotary_emb.inv_freq": torch.ones(4), "a.position_ids": torch.arange(5)}
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, tmp_path / "model.safetensors")
    assert load_model(tmp_path, dtype=None).dtype == torch.float16
    rounded = "32 of 32,672 numbers are rounded from torch.float32 to torch.float16"
    assert rounded in capfd.readouterr().err
    load_model(tmp_path)  # float32 rounds nothing
    assert not capfd.readouterr().err


def test_numbers_that_overflow_the_dtype_are_refused(tmp_path):
    save_model(make("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_model.lm_head.weight"][0, 0] = 1e5
    save_file(state, tmp_path / "model.safetensors")
    load_model(tmp_path)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        load_model(tmp_path, dtype=torch.float16)


def test_a_tensor_in_two_shards_is_refused(sharded):
    """The tensor is also in a file that the index does not name for it, and that file is read later."""
    index = json.loads((sharded.folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    name = next(name for name, file in index.items() if file == files[0])
    last = sharded.folder / files[-1]
    save_file(load_file(last) | {name: load_file(sharded.folder / files[0])[name] + 1}, last)
    assert name in sharded(lambda index: None)


def test_pickle_from_before_torch_1_6(tmp_path):
    save_model(make("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    load_model(tmp_path)


@here
def test_inspect_of_a_file(tmp_path, command, capsys):
    command(formats_cli, "inspect", STORIES / "stories260K.bin")
    assert "260,032" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(SystemExit) as caught:
        command(formats_cli, "inspect", tmp_path / "README.md")
    assert "neither .safetensors nor" in caught.value.code and not capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(tiny, tmp_path, command, umask):
    """safetensors writes files that only their owner can read, whatever the umask."""
    before = os.umask(umask)
    try:
        command(formats_cli, "convert", tiny.stage2, tmp_path / "copy")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").iterdir()} == {0o666 & ~umask}


def test_convert_refuses_in_one_line(tiny, tmp_path, command):
    """A decoder with --vision; a whole model with --llm; a target below a file; a missing tokenizer."""
    bare = tmp_path / "bare"
    bare.mkdir()
    save_model(load_model(tiny.decoder), bare)
    (tmp_path / "file").write_text("")
    cases = {
        ("--vision", tiny.clip, tiny.decoder, tmp_path / "a"): "a decoder alone",
        ("--llm", tiny.decoder, tiny.stage2, tmp_path / "a"): "has a decoder",
        (tiny.decoder, tmp_path / "file/a"): "file",
        (bare, tmp_path / "a"): "tokenizer.json",
    }
    (bare / "model.safetensors").write_bytes((bare / "model.safetensors").read_bytes()[:-4] + b"\xff" * 4)  # a NaN
    for argv, word in cases.items():
        with pytest.raises(SystemExit) as caught:
            command(formats_cli, "convert", *argv)
        assert word in caught.value.code and len(caught.value.code.splitlines()) == 1
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def test_inspect_and_convert(tiny, tmp_path, command, capsys):
    command(formats_cli, "inspect", tiny.stage2)
    out = capsys.readouterr().out
    count = sum(p.numel() for p in load_model(tiny.stage2).parameters())
    assert f"{count:,}" in out and "llava_hf" in out and "transformers 4 (llava-hf)" in out
    command(formats_cli, "inspect", tiny.clip)
    assert "CLIP" in capsys.readouterr().out
    command(formats_cli, "convert", tiny.stage2, tmp_path / "copy")
    again = load_model(tmp_path / "copy").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in load_model(tiny.stage2).state_dict().items())
    for target, word in ((tmp_path / "copy", "exists already"), (tmp_path / "other", "no such file")):
        source = tiny.stage2 if word == "exists already" else tmp_path / "nowhere"
        with pytest.raises(SystemExit) as caught:
            command(formats_cli, "convert", source, target)
        assert str(caught.value).startswith("formats") and len(str(caught.value).splitlines()) == 1


def test_processor_files(tiny, tmp_path):
    """transformers' AutoProcessor gives the same ids and pixels as our code."""
    transformers = pytest.importorskip("transformers")
    model = load_model(tiny.stage2)
    tokenizer = weights.load_tokenizer(tiny.stage2, model.config)
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    for mode in ("square", "pad"):
        model.config.image_mode = mode
        folder = tmp_path / mode
        folder.mkdir()
        save_model(model, folder)
        tokenizer.save(folder)
        processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        theirs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
        side = model.config.vision_config
        want = prompt_ids(["What is this?"], [], 1, tokenizer, "llava_hf", side.num_patches)
        assert theirs["input_ids"][0].tolist() == want
        assert torch.equal(theirs["pixel_values"][0], image_pixels(image, side.image_size, mode))


# ---------------------------------------------------------------------------------------------------------------------
# memory

MEASURE = """
import re, sys, torch
from pathlib import Path
from formats import weights
def peak():  # MB of this process; getrusage may return the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
weights.load_model(sys.argv[2])  # a tiny model first, so that the memory of the libraries does not count
before = peak()
model = weights.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
size = sum(p.nbytes for p in model.parameters()) / 2**20
print(peak() - before, size)
"""


@pytest.mark.parametrize("stored, wanted", [("float16", "float16"), ("float16", "float32"), ("float32", "bfloat16")])
def test_peak_memory_of_loading_is_little_more_than_the_weights(stored, wanted, tmp_path, monkeypatch):
    """In a new process, loading adds at most 1.15 times the weights and 20 MB, which the libraries take once."""
    monkeypatch.setattr(saving, "SHARD_BYTES", 60_000_000)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "vocab_size": 8000}
    text = TextConfig(num_attention_heads=8, **shape)
    with torch.device("meta"):
        model = Llava(LlavaConfig(text, template="raw"))
    model = model.to(getattr(torch, stored)).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)
    for name, filled in (("large", model), ("small", make("llama", decoder_only=True))):
        (tmp_path / name).mkdir()
        save_model(filled, tmp_path / name)
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small"), wanted]
    # The allocator returns freed memory at once, so that only live memory counts.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        argv, capture_output=True, text=True, cwd=Path(weights.__file__).parents[1], env=environment
    )
    most, size = map(float, result.stdout.split())
    assert size > 150 and size < most < 1.15 * size + 20, (most, size, result.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# images of every mode and shape

MODES = {"RGB": "png", "L": "png", "P": "png", "1": "png", "RGBA": "png", "LA": "png", "CMYK": "jpg"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("squared", ["square", "pad"])
def test_preprocessing_equals_transformers_to_the_bit(mode, squared, tmp_path):
    """Thirty images of random size in each mode, against transformers' PIL processors."""
    transformers = pytest.importorskip("transformers")
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    if squared == "pad":
        processor = transformers.LlavaImageProcessorPil(do_pad=True, **sizes)
    else:
        processor = transformers.CLIPImageProcessorPil(**sizes)
    rng = np.random.default_rng(0)
    for i in range(30):
        width, height = map(int, rng.integers(1, 400, 2))
        bands = 4 if mode in ("CMYK", "RGBA") else 3
        image = Image.fromarray(rng.integers(0, 256, (height, width, bands), dtype=np.uint8), None)
        image = image.convert("CMYK" if mode == "CMYK" else mode)
        path = tmp_path / f"{i}.{MODES[mode]}"
        image.save(path)
        want = processor(Image.open(path), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(image_pixels(open_image(path), 56, squared), want), (width, height)


def test_tied_head_of_an_unknown_dtype_is_refused(tiny, tmp_path):
    tensors = load_file(next(tiny.stage2.glob("*.safetensors")))
    name = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors[name.replace("model.embed_tokens", "lm_head")] = tensors[name].to(torch.float8_e4m3fn)
    shutil.copytree(tiny.stage2, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint*"))
    save_file(tensors, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match="F8_E4M3"):
        load_model(tmp_path / "model")
