"""The table of claims: its plan, its verdicts, a tiny run of three variants."""

import argparse
import json

import pytest

from inputs.files import read_json
from training.flags import read_flags
from world import claims
from world.claims import CLAIMS, VARIANTS, Claim, judge, plan
from world.real_decoder import STEPS


def test_a_verdict_needs_two_standard_errors():
    more, less = Claim("", "a", "b"), Claim("", "a", "b", "perplexity")
    assert judge(more, [5.0, 6.0, 7.0]) == judge(less, [-5.0, -6.0, -7.0]) == "yes"
    assert judge(more, [-5.0, -6.0, -7.0]) == judge(less, [5.0, 6.0, 7.0]) == "no"
    assert judge(more, [5.0, -6.0, 7.0]) == "not shown" and judge(more, [9.0]) == "one seed: open"
    equal = Claim("", "a", "b", equal=True)
    assert judge(equal, [1.0, -1.0, 0.5]) == "not refuted" and judge(equal, [-5.0, -6.0, -7.0]) == "no"
    assert judge(equal, [5.0, 6.0, 7.0]) == "not refuted"  # better is no worse


def test_every_claim_compares_two_variants():
    assert all(claim.better in VARIANTS and claim.worse in VARIANTS for claim in CLAIMS)
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} == set(VARIANTS)


def test_variants_differ_in_what_they_claim_only(tiny, tmp_path):
    args = argparse.Namespace(
        seeds=[0, 1], only=list(VARIANTS), minutes=1, out=tmp_path, llm="llm.gguf", text=None, dtype="float32"
    )
    steps = plan(args, tiny.root, ["--template", "chatml_bare"])
    commands = {step.name: " ".join(step.command).replace(str(tmp_path), "OUT") for step in steps}
    assert len(commands) == len(steps) == 2 * (4 + 3 * len(VARIANTS))
    for step in steps:
        if step.command[0] == "train.py":
            read_flags("", step.command[1:])  # train.py takes them
    base = commands["seed 1, lora"]
    stage2 = [command for name, command in commands.items() if "--stage 2" in command]
    assert len(stage2) == 2 * len(VARIANTS) and all("--template chatml_bare" in command for command in stage2)
    assert commands["seed 1, qlora"] == base.replace("seed1/lora", "seed1/qlora") + " --bits 4"
    assert all(commands[f"seed 1, qlora {name}"].endswith(" --bits 4") for name in ("evaluation", "knowledge"))
    assert commands["seed 1, linear"] == base.replace("seed1/lora", "seed1/linear").replace("-expand", "-linear")
    assert commands["seed 1, mlp"] == base.replace("seed1/lora", "seed1/mlp").replace("-expand", "-mlp2x_gelu")
    untrained = base.replace("seed1/lora", "seed1/no-stage1").replace("stage1-expand", "untrained-expand")
    assert commands["seed 1, no-stage1"] == untrained
    assert not any("--warmup" in command for command in stage2)  # only stage 1 has another warm-up
    assert "3e-3" in commands["seed 1, stage1-expand"].split()
    full = commands["seed 0, full"]
    assert commands["seed 0, full-x50"] == full.replace("/full", "/full-x50").replace("2e-5", "1e-3")
    for share, name in ((0.5, "half"), (0.25, "quarter")):
        count = int(share * STEPS[args.dtype][1] * 8)
        records = json.loads((tmp_path / f"instruct-{count}.json").read_text())
        assert len({record["id"] for record in records}) == count
        assert f"instruct-{count}.json" in commands[f"seed 0, {name}"]
    args.minutes = 10_000
    with pytest.raises(ValueError, match="dialogues, and a run reads 640000"):
        plan(args, tiny.root, [])


def test_three_variants_from_end_to_end(tiny, tmp_path, command, in_process):
    book, out = tmp_path / "book.txt", tmp_path / "claims"
    book.write_text("It is half past twelve, and the cat is not on the mat. " * 20)
    flags = ["--llm", tiny.decoder, "--speedrun", tiny.root, "--seeds", 0, "--out", out, "--text", book]
    flags += ["--dtype", "float32"]
    command(claims, *flags, "--minutes", 0.3, "--only", "frozen", "full")
    measured, table = read_json(out / "claims.json"), (out / "claims.md").read_text()
    assert set(measured) == {"frozen, seed 0", "full, seed 0"}
    assert measured["frozen, seed 0"]["perplexity"] != measured["full, seed 0"]["perplexity"]
    assert "| the decoder must train in stage 2 | full - frozen: " in table and "one seed: open" in table
    command(claims, *flags, "--minutes", 0.3, "--only", "no-stage1")
    more = read_json(out / "claims.json")
    assert set(more) == {*measured, "no-stage1, seed 0"} and measured.items() <= more.items()  # the others stay
    with pytest.raises(SystemExit) as caught:
        command(claims, *flags, "--minutes", 0.3, "--seeds", 1, 1)
    assert caught.value.code == 2
    with pytest.raises(SystemExit, match=r"was begun with --minutes 0\.3"):
        command(claims, *flags, "--minutes", 1)
