"""Tuning methods against peft, and bottlenecks against their rule: outputs, gradients, 20 steps, files both ways."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import BATCH
from faults import finish, kill_at
from safetensors.torch import load_file, save_file
from test_weights import theirs_of

import eval as evaluation
import sample
import train
from data import Records, collate, prepare_image
from formats import __main__ as formats_cli
from formats.adapters import attach, load_with_adapter, read_adapter, sample_weights
from formats.tuning_files import save_tuning
from formats.weights import load_model
from inputs.files import read_json
from inputs.index import read_records
from inputs.mixture import Source
from inputs.tokenizer import Tokenizer
from llava import IGNORE, generate
from lora import find_linears
from variants.tuning import METHODS, TRAINED, add_tuning

BY_PEFT = [method for method in METHODS if method not in ("houlsby", "pfeiffer")]
ENCODERS = {"p-tuning": "mlp_head", "prefix-mlp": "transform"}


@pytest.fixture(scope="module")
def batch(tiny):
    """A batch of the dialogues of the world, shortened to two samples for speed."""
    config, tokenizer = load_model(tiny.stage2).config, Tokenizer.load(tiny.stage2)
    dataset = Records([Source(read_records(tiny.world / "instruct.json"), tiny.world)], tokenizer, config, 1024)
    return collate([dataset[i] for i in range(BATCH // 4)], tokenizer.pad_id)


def tuned(folder, method, noise=0.0, **options):
    """A model with a method's part, whose numbers are moved from their start."""
    torch.manual_seed(0)
    model = load_model(folder).requires_grad_(False)
    add_tuning(model, method, **options)
    for name, p in model.named_parameters():
        if TRAINED.search(name):
            p.data.add_(noise * torch.randn_like(p))
    return model


def trained_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved(model, method, base, folder):
    folder.mkdir()
    weights = {name: p.detach() for name, p in trained_of(model).items()}
    sample = sample_weights(load_model(base), find_linears(load_model(base), "llm"))
    save_tuning(
        weights, folder, model.config, method, getattr(model.language_model.model, "virtual", None), base, sample
    )
    return folder


def mean_loss(model, batch):
    return model(**batch) / (batch["labels"][:, 1:] != IGNORE).sum()


def logits_of(model, batch):
    features = model.vision_features(batch["pixel_values"])
    return model.language_model.lm_head(model.language_model.model(model.embed(batch["input_ids"], features)))


def for_theirs(batch):
    return {name: batch[name] for name in ("input_ids", "labels", "pixel_values")}


def their_model(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def as_theirs(peft, ours, method, folder):
    """peft's model with the configuration that we wrote, and a map from our parameters to its own."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    theirs = peft.get_peft_model(their_model(config.base_model_name_or_path), config).train()
    names = {}
    for name, p in trained_of(ours).items():
        if name.startswith("language_model.model.virtual."):
            leaf = name.removeprefix("language_model.model.virtual.").replace("encoder", ENCODERS.get(method, ""))
            names[name] = "prompt_encoder.default." + ("embedding.weight" if leaf == "embedding" else leaf)
        else:
            path = name.replace("language_model.model.", "base_model.model.model.language_model.")
            names[name] = f"{path}.default"
        target = theirs.get_parameter(names[name])
        target.data.copy_(p.view_as(target))
    return theirs, names


def train_side_by_side(ours, their_loss, pairs, batch):
    """Twenty steps of both models from the same parameters, the pairs: losses and first gradients are equal."""
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.0) for ps in zip(*pairs)]
    before = []
    for step in range(20):
        losses = mean_loss(ours, batch), their_loss()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6, abs=1e-6), step
        before.append(losses[0].item())
        for optimizer, loss in zip(optimizers, losses):
            optimizer.zero_grad()
            loss.backward()
        for own, other in pairs if step == 0 else ():
            assert own.grad.any()
            torch.testing.assert_close(own.grad.view_as(other), other.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert before[-1] < before[0]


@pytest.mark.parametrize("method", BY_PEFT)
def test_twenty_steps_and_files_equal_peft(peft, tiny, batch, tmp_path, method):
    ours = tuned(tiny.stage2, method, 0.1, **({} if method == "ia3" else {"length": 5})).train()
    theirs, names = as_theirs(peft, ours, method, saved(ours, method, tiny.stage2, tmp_path / "start"))
    assert {name for name, p in theirs.named_parameters() if p.requires_grad} == set(names.values())
    pairs = [(p, theirs.get_parameter(names[name])) for name, p in trained_of(ours).items()]
    train_side_by_side(ours, lambda: theirs(**for_theirs(batch)).loss, pairs, batch)
    with torch.no_grad():
        expected = logits_of(ours.eval(), batch)
        folder = saved(ours, method, tiny.stage2, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(their_model(tiny.stage2), folder).eval()(**for_theirs(batch)).logits
        torch.testing.assert_close(again[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-4)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        for written in (folder, tmp_path / "theirs"):
            model, _ = load_with_adapter(tiny.stage2, written, "cpu", torch.float32)
            torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, kind", [("gpt2", "IA3"), ("gpt2", "PREFIX_TUNING"), ("qwen2", "IA3"),
                                          ("llama_gqa", "PREFIX_TUNING"), ("llama_gqa", "P_TUNING")])  # fmt: skip
def test_what_peft_wrote_for_a_decoder_loads(peft, tmp_path, family, kind):
    """With peft's own choice of layers: a fused q, k and v in GPT-2, the queries of Qwen2; and fewer key heads."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path / "base")
    if kind == "IA3":
        config = peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)
    else:
        options = {"num_virtual_tokens": 5, "encoder_hidden_size": 12}
        options |= {"prefix_projection": True} if kind == "PREFIX_TUNING" else {}
        classes = {"PREFIX_TUNING": peft.PrefixTuningConfig, "P_TUNING": peft.PromptEncoderConfig}
        config = classes[kind](task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    attach(ours, read_adapter(tmp_path / "adapter"))
    ids = torch.arange(17)[None]
    with torch.no_grad():
        logits = ours.language_model.lm_head(ours.language_model.model(ours.embed(ids)))
        torch.testing.assert_close(logits, theirs(ids).logits[:, -17:], rtol=1e-4, atol=1e-4)


def put_hub_adapters(layer, adapters, options):
    """Give a layer of transformers the adapters of `adapters` 1.2: its rule, written out from its documentation.

    Args: adapters: "attention" or "output": tensors by adapter-hub's names; options: of its adapter_config.json.
    """
    activation = {"relu": F.relu, "swish": F.silu}[options["non_linearity"]]

    def adapt(side, h, residual):  # h: output of attention or MLP; residual: what would be added to it
        if side not in adapters:
            return h + residual
        x, own = h + residual if options["original_ln_before"] else h, adapters[side]
        inner = activation(F.linear(x, own["adapter_down.0.weight"], own["adapter_down.0.bias"]))
        return F.linear(inner, own["adapter_up.weight"], own["adapter_up.bias"]) + h + residual

    def forward(hidden_states, **more):
        h, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **more)
        h = adapt("attention", h, hidden_states)
        return adapt("output", layer.mlp(layer.post_attention_layernorm(h)), h)

    layer.forward = forward


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_bottlenecks_follow_the_rule_of_adapter_hub(tiny, batch, tmp_path, method):
    ours = tuned(tiny.stage2, method, 0.1, width=6).train()
    folder = saved(ours, method, tiny.stage2, tmp_path / "ours")
    options = read_json(folder / "adapter_config.json")["config"]
    tensors = {name: p.requires_grad_() for name, p in load_file(folder / "adapter.safetensors").items()}
    theirs, pairs = their_model(tiny.stage2).train().requires_grad_(False), []
    for i, layer in enumerate(theirs.model.language_model.layers):
        found = {}
        for name, p in tensors.items():
            path, _, leaf = name.partition(".adapters.tuning.")
            if path.startswith(f"model.language_model.layers.{i}."):
                found.setdefault(path.split(".")[-1].removesuffix("_adapters"), {})[leaf] = p
                matrix, kind = leaf.removeprefix("adapter_").replace(".0", "").split(".")
                place = {"attention": "self_attn.", "output": "mlp." if method == "houlsby" else ""}
                place = place[path.split(".")[-1].removesuffix("_adapters")]
                own = f"language_model.model.layers.{i}.{place}adapter.{matrix}.{kind}"
                pairs.append((ours.get_parameter(own), p))
        assert set(found) == ({"attention", "output"} if method == "houlsby" else {"output"})
        put_hub_adapters(layer, found, options)
    assert len(pairs) == len(tensors) == len(trained_of(ours))
    train_side_by_side(ours, lambda: theirs(**for_theirs(batch)).loss, pairs, batch)
    folder = saved(ours, method, tiny.stage2, tmp_path / "again")
    model, _ = load_with_adapter(tiny.stage2, folder, "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, batch), logits_of(ours.eval(), batch))


# ---------------------------------------------------------------------------------------------------------------------
# the start, and answering


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "ia3"])
def test_the_start_is_the_base_bit_for_bit(tiny, batch, method):
    with torch.no_grad():
        base, model = load_model(tiny.stage2), tuned(tiny.stage2, method)
        assert torch.equal(logits_of(model, batch), logits_of(base, batch))


def test_a_prefix_starts_as_the_keys_and_values_of_a_prompt(tiny, batch):
    prompt, prefix = (tuned(tiny.stage2, method, length=7) for method in ("prompt", "prefix"))
    table = prompt.language_model.model.embed_tokens.weight
    rows = (prompt.language_model.model.virtual.embedding[:, None] == table).all(-1).nonzero()[:, 1].tolist()
    assert len(rows) >= 7 and prompt.config.image_token_index not in rows
    with torch.no_grad():
        torch.testing.assert_close(logits_of(prefix, batch), logits_of(prompt, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_with_a_cache_equal_those_without(babbler, method):
    """Rows of different lengths, with and without images, alone and in a batch."""
    model = tuned(babbler, method, 0.1, length=5).eval()
    config, draw = model.config, torch.Generator().manual_seed(1)
    image = [config.image_token_index] * config.tokens_per_image
    prompts = [torch.randint(9, 90, (n,), generator=draw).tolist() for n in (4, 9, 6)]
    prompts = [image + prompts[0], prompts[1], prompts[2][:3] + image + prompts[2][3:]]
    features = model.vision_features(torch.randn(2, 3, 72, 72, generator=draw))
    own, config.eos_token_ids = [features[:1], None, features[1:]], []
    together = list(zip(*generate(model, prompts, features, max_new_tokens=12)))
    for row, prompt, images in zip(together, prompts, own):
        assert [i for (i,) in generate(model, [prompt], images, max_new_tokens=12)] == list(row)
        for i, token in enumerate(row[:4]):
            with torch.no_grad():
                x = model.embed(torch.tensor([[*prompt, *row[:i]]]), images)
                logits = model.language_model.lm_head(model.language_model.model(x))[0, -1]
            logits[config.image_token_index] = -torch.inf
            assert int(logits.argmax()) == token


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_conversation_and_peft_give_the_same_answers(peft, babbler, world_images, tmp_path, method):
    """The second turn reads only what is new: the virtual tokens are still in front of the cache."""
    model, tokenizer = tuned(babbler, method, 0.1, length=5).eval(), Tokenizer.load(babbler)
    world_images[0].save(tmp_path / "image.png")
    chat = sample.Chat(model, tokenizer, [tmp_path / "image.png"], max_new_tokens=6)
    folder = saved(model, method, babbler, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(their_model(babbler), folder).eval()
    pixels = prepare_image(world_images[0], model.config).pixels
    for question in ("What is here?", "And there?"):
        list(chat.ask(question))
        ids = torch.tensor([chat.last["prompt_ids"]])
        with torch.no_grad():
            for token in chat.last["ids"]:
                inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
                assert int(theirs(**inputs).logits[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_recomputed_activations_give_the_same_gradients(tiny, batch, method):
    model, gradients = tuned(tiny.stage2, method, 0.1, length=5).train(), []
    for model.language_model.model.recompute in (False, True):
        model.zero_grad()
        model(**batch).backward()
        gradients.append(model.language_model.model.virtual.embedding.grad.clone())
    assert gradients[0].any() and torch.equal(*gradients)


# ---------------------------------------------------------------------------------------------------------------------
# runs


RUNS = {"prefix": ["--prefix-length", 4], "p-tuning": ["--tune-width", 8], "houlsby": [], "ia3": ["--bits", 4]}


def flags_of(tiny, method):
    return [*tiny.flags["stage2"], "--tune", method, *RUNS[method], "--lr", 1e-2]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, command):
    """The folder of a finished run of some methods."""
    folders = {method: tmp_path_factory.mktemp("tune") / method for method in RUNS}
    for method, folder in folders.items():
        command(train, *flags_of(tiny, method), "--steps", 6 if method == "prefix" else 2, "--out", folder)
    return folders


def test_killed_and_resumed_ends_in_the_same_bits(tiny, runs, tmp_path):
    argv = [*flags_of(tiny, "prefix"), "--out", tmp_path / "run"]
    kill_at(argv, ("train.train_step", "", 4, tmp_path / "here"))
    finish([*argv, "--resume"])
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (runs["prefix"] / name).read_bytes()


@pytest.mark.parametrize("method", RUNS)
def test_a_run_trains_its_part_and_the_scripts_take_it(tiny, runs, command, capsys, tmp_path, method):
    bits = ["--bits", 4] if method == "ia3" else []
    (path,) = runs[method].glob("adapter*.safetensors")
    names = set(load_file(path))
    assert any("multi_modal_projector" in name for name in names)
    assert not any("language_model" in name and not re.search("ia3|_adapters", name) for name in names)
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    flags = ["--image", image, "--max-new-tokens", 8, "--device", "cpu", *bits]
    command(sample, "--model", tiny.stage1, "--adapter", runs[method], *flags)
    printed = capsys.readouterr().out
    command(sample, "--model", runs[method], *flags)  # the adapter names its base
    assert capsys.readouterr().out == printed
    if method == "prefix":
        questions = ["--questions", tiny.world / "questions.jsonl", "--images", tiny.world, "--limit", 3]
        out = tmp_path / "a.jsonl"
        command(evaluation, "--adapter", runs[method], *questions, "--device", "cpu", "--out", out)
        assert len(out.read_text().splitlines()) == 3


def test_peft_loads_a_run_with_its_projector(peft, tiny, runs, batch):
    theirs = peft.PeftModel.from_pretrained(their_model(tiny.stage1), runs["prefix"]).eval()
    ours, _ = load_with_adapter(tiny.stage1, runs["prefix"], "cpu", torch.float32)
    assert ours.config.text_config.max_position_embeddings == 1024 - 4
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, batch), theirs(**for_theirs(batch)).logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def refusal(command, script, *argv):
    with pytest.raises(SystemExit) as caught:
        command(script, *argv)
    line = caught.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1, line
    return line


@pytest.mark.parametrize("more, words", [
    (["--tune", "prefix", "--lora", "llm"], "give one or the other"),
    (["--tune", "ia3", "--prefix-length", 4], "--prefix-length needs"),
    (["--tune", "prompt", "--tune-width", 4], "--tune-width needs"),
    (["--tune-width", 4], "--tune-width needs"),
    (["--tune", "prefix", "--prefix-length", 0], "at least 1"),
    (["--tune", "prefix", "--train", "llm"], "freezes the towers"),
    (["--tune", "magic"], "invalid choice"),
])  # fmt: skip
def test_wrong_flags_are_refused(tiny, command, capsys, more, words):
    with pytest.raises(SystemExit) as caught:
        command(train, *tiny.flags["stage2"], *more)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_too_long_a_prefix_is_refused(tiny, command, tmp_path):
    argv = [*tiny.flags["stage2"], "--tune", "prefix", "--out", tmp_path / "run", "--prefix-length"]
    assert "1015 virtual tokens with an image leave no room" in refusal(command, train, *argv, 1015)
    assert "more than virtual tokens leave" in refusal(command, train, *argv, 10, "--max-length", 1024)


def broken(folder, target, change):
    """A copy of an adapter with its configuration and tensors changed."""
    shutil.copytree(folder, target)
    (path,) = target.glob("adapter*.safetensors")
    values, tensors = read_json(target / "adapter_config.json"), load_file(path)
    change(values, tensors)
    (target / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, path)
    return target


def first(tensors, part):
    return next(name for name in tensors if part in name)


E = "prompt_embeddings"
BROKEN = {
    "another kind": ("prefix", lambda v, t: v.update(peft_type="VERA"), "'VERA' is not supported"),
    "no tensors": ("prefix", lambda v, t: t.pop(E), "holds no tensors of PREFIX_TUNING"),
    "another number": ("prefix", lambda v, t: v.update(num_virtual_tokens=5), "adapter_config.json has 5 tokens"),
    "another width": ("prefix", lambda v, t: t.update({E: t[E][:, :-1].contiguous()}), "should be"),
    "too long": ("prefix", lambda v, t: (v.update(num_virtual_tokens=1100), t.update({E: t[E][:1].repeat(1100, 1)})),
                 "leave no room"),
    "encoder and decoder": ("prefix", lambda v, t: v.update(num_transformer_submodules=2), "num_transformer_submod"),
    "half a bottleneck": ("houlsby", lambda v, t: t.pop(first(t, "down.0.bias")), "there is only"),
    "a parallel one": ("houlsby", lambda v, t: v["config"].update(is_parallel=True), "is_parallel True"),
    "an activation": ("houlsby", lambda v, t: v["config"].update(non_linearity="magic"), "non_linearity 'magic'"),
    "no such layer": ("houlsby", lambda v, t: [t.update({n.replace("s.0.", "s.9."): t.pop(n)}) for n in list(t)],
                      "layers.9"),
    "a matrix": ("ia3", lambda v, t: t.update({(n := first(t, "k_proj")): t[n].repeat(1, 2)}), "one row or column"),
    "a longer one": ("ia3", lambda v, t: t.update({(n := first(t, "k_proj")): t[n].repeat(2, 1)}), "should be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(tiny, runs, tmp_path, command, kind):
    method, change, words = BROKEN[kind]
    folder = broken(runs[method], tmp_path / "adapter", change)
    assert words in refusal(command, sample, "--model", tiny.stage1, "--adapter", folder, "--prompt", "a")


def test_what_a_prefix_cannot_do_is_said(tiny, runs, babbler, command, tmp_path):
    image = next((tiny.world / "heldout-0").rglob("*.png"))
    flags = ["--model", tiny.stage1, "--adapter", runs["prefix"], "--image", image]
    assert "fastv" in refusal(command, sample, *flags, "--visual-tokens", "4:fastv:1")
    look = ["--look", tmp_path / "page.png", "--look-by", "attention"]
    assert "only occlusion" in refusal(command, sample, *flags, *look)
    merge = ["merge", tiny.stage1, runs["prefix"], tmp_path / "merged"]
    assert "only LoRA can be merged" in refusal(command, formats_cli, *merge)
    assert "held other weights" in refusal(command, sample, "--model", babbler, *flags[2:])
