"""LoRA against peft: outputs, gradients, twenty steps, files in both directions; merging, training, bad input."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH
from faults import finish, kill_at
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_weights import STORIES, here, rewrite, theirs_of

import eval as evaluation
import lora
import sample
import train
from data import Records, collate
from formats import __main__ as formats_cli
from formats import configs
from formats.adapters import attach, load_with_adapter, read_adapter, sample_weights, save_adapter
from formats.saving import save_model
from formats.weights import load_model
from inputs.added_tokens import AddedToken
from inputs.bpe import ByteLevel
from inputs.files import read_json
from inputs.index import read_records
from inputs.mixture import Source
from inputs.tokenizer import Tokenizer
from llava import IGNORE
from lora import DoRALinear, LoRALinear, NF4Linear, add_lora, find_linears, lora_layers

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def batch(tiny):
    """A batch of the dialogues of the world."""
    config, tokenizer = load_model(tiny.stage2).config, Tokenizer.load(tiny.stage2)
    dataset = Records([Source(read_records(tiny.world / "instruct.json"), tiny.world)], tokenizer, config, 1024)
    return collate([dataset[i] for i in range(BATCH)], tokenizer.pad_id)


def adapted(folder, ranks=None, seed=0, bits=16, **options):
    """A model with LoRA whose B is not zero, and the ranks and alphas that add_lora returned."""
    torch.manual_seed(seed)
    model = load_model(folder, bits=bits).requires_grad_(False)
    layers = add_lora(model, ranks or {"llm": 4}, options.pop("alpha", None), options.pop("dropout", 0.0), **options)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model, layers


def saved(model, layers, base, folder, dropout=0.0):
    """Save the adapter and the projector of a model in a new folder; returns the folder."""
    folder.mkdir()
    trained = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name or "projector" in name}
    save_adapter(trained, folder, model.config, layers, dropout, base, sample_weights(model, layers))
    return folder


def mean_loss(model, batch):
    return model(**batch) / (batch["labels"][:, 1:] != IGNORE).sum()


def logits_of(model, batch):
    features = model.vision_features(batch["pixel_values"])
    hidden = model.language_model.model(model.embed(batch["input_ids"], features))
    return model.language_model.lm_head(hidden)


def for_peft(batch):
    return {name: batch[name] for name in ("input_ids", "labels", "pixel_values")}


# ---------------------------------------------------------------------------------------------------------------------
# the layer


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dora", [False, True])
def test_new_lora_computes_the_base_model_bit_for_bit(tiny, batch, bits, dora):
    base, model = load_model(tiny.stage2, bits=bits), load_model(tiny.stage2, bits=bits)
    add_lora(model, {"llm": 4, "vision": 8}, None, 0.0, dora=dora)
    with torch.no_grad():
        assert torch.equal(logits_of(model, batch), logits_of(base, batch))


def test_a_is_kaiming_uniform_and_b_is_zero():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(400, 300), 64, 0.5)
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.weight.abs().max() <= bound and not layer.lora_B.weight.any()
    assert layer.lora_A.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_dropout_is_on_the_input_of_a_in_training_only():
    layer = LoRALinear(torch.nn.Linear(512, 4, bias=False), 2, 1.0, dropout=0.5)
    torch.nn.init.ones_(layer.lora_A.weight)
    torch.nn.init.ones_(layer.lora_B.weight)
    torch.nn.init.zeros_(layer.base.weight)
    x = torch.ones(1, 512)
    assert layer.eval()(x)[0].tolist() == [1024.0] * 4
    torch.manual_seed(1)
    noisy = layer.train()(x)[0]
    assert len(set(noisy.tolist())) == 1 and noisy[0] != 1024 and abs(noisy[0] - 1024) < 200


def test_dora_with_dropout_and_merged_follow_the_formula():
    """As peft has it, dropout is on the input of everything that the update adds to the base's output."""
    torch.manual_seed(0)
    base, x = torch.nn.Linear(24, 16), torch.randn(5, 24)
    layer = DoRALinear(base, 4, 2.0, dropout=0.5)
    for p in (layer.lora_B.weight, layer.lora_magnitude_vector):
        torch.nn.init.normal_(p)
    update = 2 * layer.lora_B.weight @ layer.lora_A.weight
    gain = layer.lora_magnitude_vector / (base.weight + update).norm(dim=1)
    torch.testing.assert_close(layer.eval()(x), x @ (gain[:, None] * (base.weight + update)).T + base.bias)
    torch.testing.assert_close(layer.merged()(x), layer(x))
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(y, base(x) + (gain - 1) * (dropped @ base.weight.T) + gain * (dropped @ update.T))


def test_lora_plus_gives_b_the_rates_of_peft(peft, tiny):
    from peft.optimizers import create_loraplus_optimizer

    model, _ = adapted(tiny.stage2)
    args = train.read_flags("", ["--stage", "2", "--lora", "llm", "--lora-plus", "16", "--lr", "1e-3", "--train", ""])
    ours = {id(p): group["peak"] for group in train.make_optimizer(model, args, train.Distributed("cpu")).param_groups
            for p in group["params"]}  # fmt: skip
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    theirs = peft.get_peft_model(their_model(tiny.stage2), config)
    groups = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for half in "AB":
        own = {ours[id(getattr(layer, f"lora_{half}").weight)] for layer in lora_layers(model).values()}
        assert own == {rates[id(p)] for name, p in theirs.named_parameters() if f"lora_{half}" in name}
        assert own == {1e-3 if half == "A" else 16e-3}


def test_rank_stabilized_scale_divides_by_the_root():
    assert lora.lora_scale(8, 16, rank_stabilized=True) == pytest.approx(5.656854)
    assert lora.lora_scale(8, 16) == 2


# ---------------------------------------------------------------------------------------------------------------------
# which layers


def test_layers_are_found_by_path(tiny):
    model = load_model(tiny.stage2)
    llm, vision = find_linears(model, "llm"), find_linears(model, "vision")
    assert len(llm) == 2 * 7 and all(path.startswith("language_model.model.layers.") for path in llm)
    assert len(vision) == 1 * 6 and all(path.startswith("vision_tower.") for path in vision)  # one of two is used
    layers = add_lora(model, {"llm": 4}, None, 0.0, ["q_proj", "v_proj"])  # layers of the tower have these names too
    ends = {f"self_attn.{name}_proj" for name in "qv"}
    assert set(layers) == {f"language_model.model.layers.{i}.{end}" for i in (0, 1) for end in ends}
    assert set(lora_layers(model)) == set(layers) and set(layers.values()) == {(4, 8)}


@pytest.mark.parametrize("ranks, names, words", [
    ({"llm": 0}, None, "a rank of 0"),
    ({"llm": 4, "vision": 10_000}, None, "a rank of 10000"),
    ({"llm": 4}, ["q_prj"], "'q_prj'"),
    ({"llm": 4}, ["fc1"], "'fc1'"),
])  # fmt: skip
def test_wrong_ranks_and_names_are_refused(tiny, ranks, names, words):
    model = load_model(tiny.stage2)
    with pytest.raises(ValueError, match=words):
        add_lora(model, ranks, None, 0.0, names)
    assert not lora_layers(model)


# ---------------------------------------------------------------------------------------------------------------------
# peft


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def their_model(folder):
    import transformers

    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def their_factors(theirs, name):
    """A, B and, with DoRA, the lengths in peft's model of the layer that we call `name`."""
    path = name.replace("language_model.model.", "model.language_model.")
    layer = theirs.base_model.model.get_submodule(path.replace("vision_tower.vision_model.", "model.vision_tower."))
    lengths = [module.weight for module in layer.lora_magnitude_vector.values()]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, *lengths


@pytest.mark.parametrize("ranks, dora", [({"llm": 4}, False), ({"llm": 4, "vision": 8}, False), ({"llm": 4}, True)])
def test_loss_gradients_and_twenty_steps_equal_peft(peft, tiny, batch, tmp_path, ranks, dora):
    ours, layers = adapted(tiny.stage2, ranks, dora=dora)
    folder = saved(ours, layers, tiny.stage2, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(their_model(tiny.stage2), folder, is_trainable=True).train()
    ours.train().multi_modal_projector.requires_grad_(True)
    assert {p.shape for p in theirs.parameters() if p.requires_grad} == {
        p.shape for p in ours.parameters() if p.requires_grad
    }
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for model in (ours, theirs)
    ]
    for step in range(20):
        loss, expected = mean_loss(ours, batch), theirs(**for_peft(batch)).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6), step
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        expected.backward()
        if step == 0:
            for path, layer in lora_layers(ours).items():
                own_factors = [layer.lora_A.weight, layer.lora_B.weight, getattr(layer, "lora_magnitude_vector", None)]
                for own, other in zip(own_factors, their_factors(theirs, path)):
                    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()


PATTERNS = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["multi_modal_projector"]},
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_an_adapter_written_by_peft_loads(peft, tiny, batch, tmp_path, kind):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "up_proj", "fc1"],
        exclude_modules=r".*vision_tower.*layers\.1\..*",
        **PATTERNS[kind],
    )
    theirs = peft.get_peft_model(their_model(tiny.stage2), config)
    for name, p in theirs.named_parameters():
        if "modules_to_save" in name:
            p.data.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_with_adapter(tiny.stage2, tmp_path / "theirs", "cpu", torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(**for_peft(batch)).logits
        torch.testing.assert_close(logits_of(ours, batch), expected, rtol=1e-4, atol=1e-4)
    ranks = {path.split(".")[-1]: len(layer.lora_A.weight) for path, layer in lora_layers(ours).items()}
    assert ranks["q_proj"] == (8 if kind == "rank_pattern" else 4)


GROWN = {  # kinds of adapters whose vocabulary grew by two tokens
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding only": {"modules_to_save": ["embed_tokens"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": {"embed_tokens": [99, 100], "lm_head": [99, 100]}},
}


def write_tokenizer(folder, words):
    """Printable ASCII and </s> in 99 ids, then `words`."""
    letters = {bytes([33 + i]): i for i in range(94)}
    ours = Tokenizer(ByteLevel(letters, r"\S+|\s+"), {"<s>": 97, "</s>": 98}, {"eos": "</s>"})
    ours.added = {word: AddedToken(99 + i, special=False) for i, word in enumerate(words)}
    folder.mkdir(exist_ok=True)
    Tokenizer(ours.codec, ours.specials, ours.roles, added=ours.added).save(folder)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("kind", GROWN)
def test_an_adapter_with_a_grown_vocabulary_brings_its_rows_and_its_tokenizer(peft, tmp_path, command, kind, family):
    import transformers

    base, adapter = theirs_of(family), tmp_path / "adapter"
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", [])
    write_tokenizer(adapter, ["<box>", "[SEG]"])
    base.resize_token_embeddings(101)
    with torch.no_grad():
        base.get_output_embeddings().weight[99:] = base.get_output_embeddings().weight[:99].mean(0)  # in no file
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **GROWN[kind])
    theirs = peft.get_peft_model(base, config).eval()
    for name, p in theirs.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            p.data.add_(torch.randn(p.shape) / 10)
    theirs.save_pretrained(adapter)
    command(formats_cli, "merge", tmp_path / "base", adapter, tmp_path / "merged")
    ids = torch.arange(101)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    for folder, extra in ((tmp_path / "base", adapter), (tmp_path / "merged", None)):
        ours, tokenizer = load_with_adapter(folder, extra, "cpu", torch.float32)
        assert tokenizer.encode("a<box>[SEG]") == [64, 99, 100] and tokenizer.decode([99]) == "<box>"
        with torch.no_grad():
            logits = ours.language_model.lm_head(ours.language_model.model(ours.embed(ids)))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert text.encode("a<box>[SEG]", add_special_tokens=False) == [64, 99, 100]


def test_a_gpt2_adapter_with_fused_q_k_v_loads(peft, tmp_path):
    theirs = theirs_of("gpt2")
    theirs.save_pretrained(tmp_path / "base")
    layers = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=True, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    attach(ours, read_adapter(tmp_path / "adapter"))
    ids = torch.randint(0, 99, (2, 17))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours.language_model.lm_head(ours.language_model.model(ours.embed(ids))), expected)
        lora.merge(ours)
        merged = ours.language_model.lm_head(ours.language_model.model(ours.embed(ids)))
        torch.testing.assert_close(merged, theirs.merge_and_unload()(ids).logits)


@pytest.mark.parametrize("vision", ["someone/tiny-clip", "/data/towers/ours-336"])
def test_an_adapter_in_the_llava_authors_format_loads(vision, tmp_path, monkeypatch, tiny, peft):
    """The base is a decoder alone, the projector a pickle beside the adapter, the tower another folder."""
    whole = load_model(tiny.stage2)
    tower = dict(vars(whole.config.vision_config))
    monkeypatch.setitem(configs.TOWERS, "tiny-clip", tower)
    base, folder = tmp_path / "vicuna", tmp_path / "llava-lora"
    decoder = load_model(tiny.decoder)
    assert decoder.config.vision_config is None
    shutil.copytree(tiny.decoder, base)
    model, _ = adapted(tiny.stage2)
    decoder_state = decoder.state_dict()
    for name, p in model.state_dict().items():  # give the adapted model the decoder of the base folder
        if name.replace(".base.", ".") in decoder_state and ".lora_" not in name:
            p.copy_(decoder_state[name.replace(".base.", ".")])
    folder.mkdir()
    factors = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    named = {name.replace("language_model.model.", "base_model.model.model."): p for name, p in factors.items()}
    save_file({name: p.contiguous() for name, p in named.items()}, folder / WEIGHTS)
    projector = {name: p.detach() for name, p in model.named_parameters() if "projector" in name}
    renamed = {f"base_model.model.{name}": p for name, p in rewrite(projector, "authors'").items()}
    torch.save(renamed, folder / "non_lora_trainables.bin")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = dict(vars(whole.config.text_config))
    text |= {
        "mm_vision_tower": vision,
        "mm_hidden_size": tower["hidden_size"],
        "mm_vision_select_layer": -2,
    }
    text |= {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad"}
    text |= {"mm_projector_type": "mlp2x_gelu", "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(text))
    ours, _ = load_with_adapter(base, folder, "cpu", torch.float32, vision=tiny.clip)
    ids, features = torch.tensor([[5, 6, 7, 8]]), ours.vision_features(torch.randn(1, 3, 72, 72))
    with torch.no_grad():
        assert torch.equal(ours.multi_modal_projector(features), model.multi_modal_projector(features))
        hidden, wanted = (m.language_model.model(m.embed(ids)) for m in (ours, model))
    assert torch.equal(hidden, wanted)
    formats_cli.merge_folder(base, folder, tmp_path / "merged", vision=tiny.clip)
    merged = load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged.language_model.model(merged.embed(ids)), wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# merging


def test_merged_equals_unmerged(tiny, batch, tmp_path, command, capsys):
    model, layers = adapted(tiny.stage2, {"llm": 4, "vision": 4})
    folder = saved(model, layers, tiny.stage2, tmp_path / "adapter")
    command(formats_cli, "merge", tiny.stage2, folder, tmp_path / "merged")
    assert "differ by at most" in capsys.readouterr().out
    name = "chat_template.jinja"
    assert (tmp_path / "merged" / name).read_text() == (tiny.stage2 / name).read_text()
    merged = load_model(tmp_path / "merged")
    with torch.no_grad():
        expected = logits_of(model.eval(), batch)
        assert (logits_of(merged, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (logits_of(load_model(tiny.stage2), batch) - expected).abs().max() > 1e-2 * expected.abs().max()
    command(sample, "--model", tmp_path / "merged", "--prompt", "What is it?", "--max-new-tokens", 4)
    assert "already" in refusal(command, sample, "--model", tmp_path / "merged", "--adapter", folder, "--prompt", "a")
    command(formats_cli, "quantize", tmp_path / "merged", tmp_path / "four")
    command(formats_cli, "convert", tmp_path / "merged", tmp_path / "again")
    for copy in ("four", "again"):
        assert "already" in refusal(command, formats_cli, "merge", tmp_path / copy, folder, tmp_path / "twice")
    for base in (tmp_path / "merged", tiny.stage2):  # a second time: onto the merged model, or into the same folder
        target = tmp_path / ("twice" if base != tiny.stage2 else "merged")
        with pytest.raises(SystemExit, match="already"):
            command(formats_cli, "merge", base, folder, target)
    assert not (tmp_path / "twice").exists()


def test_merging_in_place_twice_is_an_error(tiny):
    model, _ = adapted(tiny.stage2)
    lora.merge(model)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        lora.merge(model)


def test_an_update_of_zero_is_not_merged(tiny, tmp_path, command):
    model = load_model(tiny.stage2)
    layers = add_lora(model, {"llm": 4}, None, 0.0)
    folder = saved(model, layers, tiny.stage2, tmp_path / "adapter")
    with pytest.raises(SystemExit, match="zero everywhere"):
        command(formats_cli, "merge", tiny.stage2, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_into_four_bits_dequantizes_the_weights(tiny, tmp_path, command, capsys):
    command(formats_cli, "quantize", tiny.stage2, tmp_path / "four")
    model, layers = adapted(tmp_path / "four")
    folder = saved(model, layers, tmp_path / "four", tmp_path / "adapter")
    capsys.readouterr()
    command(formats_cli, "merge", tmp_path / "four", folder, tmp_path / "merged")
    printed = capsys.readouterr().out
    assert "differ by at most" in printed and "was in four bits, this is in float32" in printed
    command(formats_cli, "merge", tiny.stage2, folder, tmp_path / "same", "--bits", 4)
    assert "was in four bits" in capsys.readouterr().out
    merged, same = load_model(tmp_path / "merged"), load_model(tmp_path / "same").state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in merged.state_dict().items())
    assert not any(isinstance(module, NF4Linear) for module in merged.modules())
    for path, layer in lora_layers(model).items():
        expected = layer.base.dequantize() + layer.lora_B.weight @ layer.lora_A.weight * layer.scale
        torch.testing.assert_close(merged.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# training


RUNS = {
    "lora": ["--lora", "llm"],
    "qlora": ["--lora", "llm", "--bits", 4],
    "both": ["--lora", "both", "--lora-rank", 8],
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, command):
    """The folder of a finished run of each kind."""
    root = tmp_path_factory.mktemp("lora")
    folders = {}
    for name, more in RUNS.items():
        folders[name] = root / name
        command(train, *tiny.flags["stage2"], *more, "--lr", 1e-2, "--out", folders[name])
    return folders


def test_the_projector_can_stay_frozen(tiny, tmp_path, command):
    command(train, *repeat(tiny, "lora"), "--train", "", "--out", tmp_path / "run")
    kept = load_file(tmp_path / "run" / WEIGHTS)
    assert kept and all(".lora_" in name for name in kept)
    load_with_adapter(tiny.stage1, tmp_path / "run", "cpu", torch.float32)


def repeat(tiny, name):
    return [*tiny.flags["stage2"], *RUNS[name], "--lr", 1e-2]


@pytest.mark.parametrize("name", RUNS)
def test_only_trained_weights_are_saved_and_changed(tiny, runs, name):
    base = load_model(tiny.stage1)
    model, _ = load_with_adapter(runs[name], None, "cpu", torch.float32, 4 if name == "qlora" else 16)
    with safe_open(runs[name] / WEIGHTS, "pt") as file:
        keys = set(file.keys())
    layers, projector = lora_layers(model), dict(base.multi_modal_projector.named_parameters())
    assert len(keys) == 2 * len(layers) + len(projector)
    assert any(layer.lora_B.weight.any() for layer in layers.values())
    for key, p in projector.items():
        assert not torch.equal(dict(model.multi_modal_projector.named_parameters())[key], p), key
    for path, p in base.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        if "projector" in path or isinstance(getattr(module, "base", module), NF4Linear):
            continue
        assert torch.equal(getattr(getattr(module, "base", module), leaf), p), path
    assert not (runs[name] / "model.safetensors").exists()


def test_the_four_bit_base_does_not_change(tiny, runs):
    before = load_model(tiny.stage1, bits=4).state_dict()
    model, _ = load_with_adapter(runs["qlora"], None, "cpu", torch.float32, 4)
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "projector" not in name)


def log_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_killed_and_resumed_ends_in_the_same_bits(tiny, runs, tmp_path, name):
    argv = [*repeat(tiny, name), "--out", tmp_path / "run"]
    kill_at(argv, ("train.train_step", "", 4, tmp_path / "here"))
    finish([*argv, "--resume"])
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (runs[name] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("more", [["--accumulate", 2], ["--recompute"], ["--cache-gb", 0]])
def test_flags_that_save_memory_do_not_change_the_result(tiny, command, tmp_path, more):
    """Without dropout, whose mask differs between micro-batches."""
    argv = [*repeat(tiny, "qlora"), "--lora-dropout", 0]
    command(train, *argv, "--out", tmp_path / "plain")
    command(train, *argv, *more, "--out", tmp_path / "other")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "other"))
    for name, tensor in one.items():  # as a whole: where a gradient is almost zero, its rounding decides AdamW's step
        assert (other[name] - tensor).norm() <= 1e-3 * tensor.norm()


@pytest.mark.parametrize("shard", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_two_ranks_train_as_one(tiny, tmp_path, name, shard):
    argv = [*repeat(tiny, name), "--lora-dropout", 0, "--steps", 3, "--shard", shard]
    if name == "qlora" and shard == "fsdp":
        return
    finish([*argv, "--out", tmp_path / "alone"])
    finish([*argv, "--out", tmp_path / "two"], ranks=2)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("alone", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=2e-5)


def test_every_checkpoint_holds_adapter_and_projector(tiny, tmp_path, command, monkeypatch):
    monkeypatch.setattr(train.runs.Run, "finish", lambda *_: None)
    command(train, *repeat(tiny, "lora"), "--out", tmp_path / "run")
    kept = load_file(tmp_path / "run" / "latest" / "trained.safetensors")
    assert any("lora_A" in name for name in kept) and any("projector" in name for name in kept)
    assert all("lora_" in name or "projector" in name for name in kept)


def test_gradients_reach_lora_with_frozen_embeddings(tiny, batch):
    model, _ = adapted(tiny.stage2, bits=4)
    model.train()
    gradients = []
    for recompute in (False, True):
        model.language_model.model.recompute = recompute
        model.zero_grad()
        model(**batch).backward()
        gradients.append([layer.lora_A.weight.grad.clone() for layer in lora_layers(model).values()])
    assert all(g.any() and torch.equal(g, h) for g, h in zip(*gradients))


def test_sample_and_eval_take_an_adapter(tiny, runs, command, capsys, tmp_path):
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    flags = ["--image", image, "--max-new-tokens", 8, "--device", "cpu"]
    command(sample, "--model", tiny.stage1, "--adapter", runs["lora"], *flags)
    printed = capsys.readouterr().out
    command(sample, "--model", runs["lora"], *flags)  # the adapter names its base
    assert capsys.readouterr().out == printed
    command(sample, "--model", tiny.stage1, "--adapter", runs["qlora"], "--bits", 4, *flags)
    questions = ["--questions", tiny.world / "questions.jsonl", "--images", tiny.world, "--limit", 3, "--device", "cpu"]
    command(evaluation, "--model", tiny.stage1, "--adapter", runs["lora"], *questions, "--out", tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", RUNS)
def test_peft_loads_a_trained_adapter(peft, tiny, runs, batch, name):
    theirs = peft.PeftModel.from_pretrained(their_model(tiny.stage1), runs[name]).eval()
    ours, _ = load_with_adapter(tiny.stage1, runs[name], "cpu", torch.float32)
    with torch.no_grad():
        expected = theirs(**for_peft(batch)).logits
        torch.testing.assert_close(logits_of(ours, batch), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def refusal(command, script, *argv):
    with pytest.raises(SystemExit) as caught:
        command(script, *argv)
    line = caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1, line
    return line


def test_another_base_is_refused(tiny, runs, babbler, tmp_path, command):
    """A base of the same shape with other weights, and a decoder without a tower."""
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    assert "held other weights" in refusal(
        command, sample, "--model", babbler, "--adapter", runs["lora"], "--image", image
    )
    assert "other weights" in refusal(command, formats_cli, "merge", babbler, runs["lora"], tmp_path / "merged")
    assert "vision_tower" in refusal(command, formats_cli, "merge", tiny.decoder, runs["both"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_a_projector_needs_its_own(tiny, tmp_path, command):
    command(train, *tiny.flags["stage2"], "--lora", "llm", "--train", "", "--out", tmp_path / "adapter")
    shutil.copytree(tiny.stage1, tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    names = [name for name in tensors if name.startswith("multi_modal_projector") and name.endswith("weight")]
    tensors |= {name: torch.randn_like(tensors[name]) for name in names}
    save_file(tensors, tmp_path / "base/model.safetensors")
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    argv = ["--adapter", tmp_path / "adapter", "--image", image, "--prompt", "Red?", "--max-new-tokens", 2]
    command(sample, "--model", tiny.stage1, *argv)
    assert "multi_modal_projector" in refusal(command, sample, "--model", tmp_path / "base", *argv)


def broken(runs, folder, change):
    """A copy of an adapter with its configuration and tensors changed."""
    shutil.copytree(runs["lora"], folder)
    values, tensors = read_json(folder / "adapter_config.json"), load_file(folder / WEIGHTS)
    change(values, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / WEIGHTS)
    return folder


A = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "another rank": (lambda v, t: v.update(r=5), "its rank is 5"),
    "rank 0": (lambda v, t: v.update(r=0), "r of"),
    "no alpha": (lambda v, t: v.pop("lora_alpha"), "lora_alpha of"),
    "no lora_A": (lambda v, t: t.pop(A), "lacks lora_A"),
    "not LoRA": (lambda v, t: v.update(peft_type="IA3"), "IA3"),
    "DoRA": (lambda v, t: v.update(use_dora=True), "use_dora"),
    "a start that moves the base": (lambda v, t: v.update(init_lora_weights="pissa"), "pissa"),
    "biases": (lambda v, t: v.update(bias="all"), "bias"),
    "alpha is no number": (lambda v, t: v.update(lora_alpha=math.nan), "lora_alpha of"),
    "patterns in a list": (lambda v, t: v.update(rank_pattern=[1]), "rank_pattern cannot be read"),
    "an invalid pattern": (lambda v, t: v.update(rank_pattern={"(": 1}), "rank_pattern cannot be read"),
    "integers": (lambda v, t: t.update({A: t[A].to(torch.int32)}), "should be float32"),
    "an unknown part": (lambda v, t: t.update({A.replace("layers.0", "blocks.0"): t.pop(A)}), "belong to no part"),
    "no such layer": (
        lambda v, t: [t.update({k.replace("s.0.", "s.9."): t.pop(k)}) for k in [*t] if "s.0.self" in k],
        "9",
    ),
    "not finite": (lambda v, t: t[A].fill_(math.inf), "not finite"),
    "no tensors": (lambda v, t: [t.pop(key) for key in list(t) if "lora" in key], "holds no LoRA"),
    "twice": (lambda v, t: t.update({A.replace("lora_A", "lora_A.default"): t[A].clone()}), "given twice"),
    "another shape": (lambda v, t: t.update({A: F.pad(t[A], (0, 1))}), "another base"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_named(tiny, runs, tmp_path, command, kind):
    change, words = BROKEN[kind]
    folder = broken(runs, tmp_path / "adapter", change)
    assert words in refusal(command, formats_cli, "merge", tiny.stage1, folder, tmp_path / "merged")
    assert words in refusal(command, sample, "--model", tiny.stage1, "--adapter", folder, "--prompt", "a")
    assert not (tmp_path / "merged").exists()


def test_only_unusual_prefixes_of_an_adapter_are_said(tiny, runs, batch, tmp_path, capfd):
    """peft puts base_model.model. before every name; torch.compile adds _orig_mod."""
    model = load_with_adapter(tiny.stage1, runs["lora"], "cpu", torch.float32)[0]
    assert not capfd.readouterr().err

    def wrap(values, tensors):
        for name in list(tensors):
            tensors[name.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors.pop(name)

    wrapped = broken(runs, tmp_path / "wrapped", wrap)
    again = load_with_adapter(tiny.stage1, wrapped, "cpu", torch.float32)[0]
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    printed = capfd.readouterr().err
    assert printed.endswith(": _orig_mod. is taken off the names of its tensors\n") and printed.count("\n") == 1


def test_wrong_kinds_of_folder_are_refused(tiny, runs, tmp_path, command):
    assert "no adapter" in refusal(command, sample, "--model", tiny.stage1, "--adapter", tiny.stage2, "--prompt", "a")
    assert "no adapter" in refusal(command, formats_cli, "merge", tiny.stage1, tiny.stage2, tmp_path / "merged")
    orphan = broken(runs, tmp_path / "orphan", lambda v, t: v.update(base_model_name_or_path="someone/model"))
    assert "--model" in refusal(command, sample, "--model", orphan, "--prompt", "a")
    argv = [*tiny.flags["stage2"][:2], "--model", runs["lora"], *tiny.flags["stage2"][4:], "--out", tmp_path / "run"]
    assert "is an adapter" in refusal(command, train, *argv)
    line = refusal(command, sample, "--model", runs["lora"], "--adapter", runs["qlora"], "--prompt", "a")
    assert "is an adapter" in line


@pytest.mark.parametrize("note", [5, [1, [2]], {"x": 5}, [[1, 2]]])
def test_an_unreadable_base_sample_is_refused(tiny, runs, tmp_path, command, note):
    folder = broken(runs, tmp_path / "adapter", lambda v, t: None)
    path = next(iter(read_adapter(runs["lora"]).base_sample))
    text = json.dumps({path: note} if isinstance(note, (int, list)) else note)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"base": text})
    line = refusal(command, sample, "--model", tiny.stage1, "--adapter", folder, "--prompt", "a")
    assert "cannot be read" in line


def test_four_bit_weights_do_not_train(tiny, tmp_path, command):
    command(formats_cli, "quantize", tiny.stage1, tmp_path / "four")
    argv = ["--stage", 2, "--model", tmp_path / "four", *tiny.flags["stage2"][4:], "--out", tmp_path / "run"]
    assert "is in four bits" in refusal(command, train, *argv)
    command(train, *argv, "--train", "projector")


def test_an_adapter_without_a_template_takes_the_base_template(tiny, runs, tmp_path):
    folder = broken(runs, tmp_path / "adapter", lambda v, t: None)
    values = read_json(folder / "config.json")
    for key in ("template", "image_mode"):
        values.pop(key)
    (folder / "config.json").write_text(json.dumps(values))
    base = load_model(tiny.stage1).config
    found = load_with_adapter(tiny.stage1, folder, "cpu", torch.float32)[0].config
    assert (found.template, found.image_mode) == (base.template, base.image_mode)


def test_an_adapter_alone_loads_the_base_it_names(tiny, runs, command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(sample, "--adapter", runs["lora"], "--prompt", "What is it?", "--max-new-tokens", 4, "--device", "cpu")
    printed = capsys.readouterr().out
    flags = ["--prompt", "What is it?", "--max-new-tokens", 4, "--device", "cpu"]
    command(sample, "--model", tiny.stage1, "--adapter", runs["lora"], *flags)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("argv, words", [
    (["--bits", 4], "--bits 4 needs --lora"),
    (["--lora", "llm", "--train", "projector,llm"], "--lora freezes the towers"),
    (["--lora", "llm", "--lora-dropout", 1], "--lora-dropout"),
    (["--lora", "llm", "--bits", 4, "--shard", "fsdp"], "--shard zero1"),
    (["--lora", "llm", "--vision", "clip"], "--model"),
    (["--lora", "llm", "--stage", 1], "stage 2"),
    (["--lora", "all"], "--lora"),
    (["--train", ""], "--train names nothing"),
    (["--lora-rank", 8], "--lora-rank needs --lora"),
    (["--lora", "llm", "--lora-alpha", 0], "--lora-alpha"),
    (["--lora", "llm", "--lora-alpha", "nan"], "--lora-alpha"),
])  # fmt: skip
def test_contradictory_flags_are_refused(capsys, argv, words):
    with pytest.raises(SystemExit):
        train.read_flags("", ["--stage", "2", *map(str, argv)])
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("argv, words", [
    (["--lora", "llm", "--lora-rank", 0], "a rank of 0"),
    (["--lora", "llm", "--lora-layers", "q_prj"], "'q_prj'"),
    (["--lora", "vision", "--lora-layers", "o_proj"], "'o_proj'"),
    (["--lora", "both", "--lora-layers", "o_proj"], "no layer of vision is called o_proj"),
])  # fmt: skip
def test_wrong_rank_and_layer_flags_are_refused(tiny, command, tmp_path, argv, words):
    assert words in refusal(command, train, *tiny.flags["stage2"], *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# a real decoder


@here
def test_qlora_on_a_real_decoder(peft, tmp_path):
    """stories260K in four bits learns another story; peft and the merged model compute the same logits."""
    import transformers

    base = tmp_path / "base"
    model = load_model(STORIES)
    base.mkdir()
    save_model(model, base)
    tokenizer = Tokenizer.load(STORIES)
    tokenizer.save(base)
    text = (
        "Once upon a time, there was a red robot named Bolt. Bolt lived on the moon and loved to fix old radios. " * 2
    )
    ids = torch.tensor([tokenizer.encode(text)[:200]])
    model, layers = adapted(base, {"llm": 8}, bits=4)
    for layer in lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B.weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _step in range(40):
        loss = model.train()(ids, ids) / (ids.shape[1] - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] / 3
    folder = saved(model, layers, base, tmp_path / "adapter")
    ours = load_model(base)
    attach(ours, read_adapter(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    formats_cli.merge_folder(base, folder, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    with torch.no_grad():
        expected = theirs(ids).logits
        for own in (ours, merged):
            logits = own.language_model.lm_head(own.language_model.model(own.embed(ids)))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
