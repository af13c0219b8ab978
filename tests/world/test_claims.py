"""The table of claims: its plan, its verdicts, the peak memory of a command, a tiny run of two variants."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from inputs.files import read_json
from world import claims
from world.claims import CLAIMS, VARIANTS, Claim, judge, make_plan
from world.real_decoder import STEPS

ROOT = Path(__file__).parents[2]


def test_a_verdict_needs_two_standard_errors():
    more, less = Claim("", "a", "b"), Claim("", "a", "b", "perplexity")
    assert judge(more, [5.0, 6.0, 7.0]) == judge(less, [-5.0, -6.0, -7.0]) == "yes"
    assert judge(more, [-5.0, -6.0, -7.0]) == judge(less, [5.0, 6.0, 7.0]) == "no"
    assert judge(more, [5.0, -6.0, 7.0]) == "not shown" and judge(more, [9.0]) == "one seed: open"
    equal = Claim("", "a", "b", equal=True)
    assert judge(equal, [1.0, -1.0, 0.5]) == "not refuted" and judge(equal, [5.0, 6.0, 7.0]) == "no"


def test_every_claim_compares_two_variants():
    assert all(claim.better in VARIANTS and claim.worse in VARIANTS for claim in CLAIMS)
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} == set(VARIANTS)


def test_variants_differ_in_what_they_claim_only(tiny, tmp_path):
    args = argparse.Namespace(
        seeds=[0, 1], only=list(VARIANTS), minutes=1, out=tmp_path, llm="llm.gguf", text=None, dtype="float32"
    )
    plan = make_plan(args, tiny.root, ["--template", "chatml_bare"])
    commands = {step.name: " ".join(step.command).replace(str(tmp_path), "OUT") for step in plan.steps}
    assert len(commands) == len(plan.steps) == 2 * (2 + 3 * len(VARIANTS))
    base = commands["seed 1, lora"]
    stage2 = [command for name, command in commands.items() if "--stage 2" in command]
    assert len(stage2) == 2 * len(VARIANTS) and all("--template chatml_bare" in command for command in stage2)
    assert commands["seed 1, qlora"] == base.replace("seed1/lora", "seed1/qlora") + " --bits 4"
    assert commands["seed 1, linear"].replace("stage1-linear", "stage1") == base.replace("seed1/lora", "seed1/linear")
    assert not any("--warmup" in command for command in stage2)  # only stage 1 has another warm-up
    assert "--whiten" in commands["seed 1, no-stage1"] and "stage1" not in commands["seed 1, no-stage1"].split()
    assert commands["seed 0, full-x50"] == commands["seed 0, full"].replace("/full", "/full-x50").replace(
        "2e-5", "1e-3"
    )
    for share, name in ((0.5, "half"), (0.25, "quarter")):
        count = int(share * STEPS[args.dtype][1] * 8)
        records = json.loads((tmp_path / f"instruct-{count}.json").read_text())
        assert (
            len({record["id"] for record in records}) == count
            and f"instruct-{count}.json" in commands[f"seed 0, {name}"]
        )


PEAKS = """
from world.speedrun import Runner
runner = Runner()
for code in ("x = bytearray(1_000_000_000); import sys; sys.exit(3)", ""):
    print(runner.run(["-c", code]), runner.peak)
"""


def test_the_peak_memory_of_a_command():
    """In a process of its own: a child's peak is at least its parent's, and this one may be large."""
    result = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    (first, large), (second, small) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert (first, second) == (3, 0) and large > 1e9 > small  # of each command alone, not of all so far


def test_two_variants_from_end_to_end(tiny, tmp_path, command, in_process):
    book, out = tmp_path / "book.txt", tmp_path / "claims"
    book.write_text("It is half past twelve, and the cat is not on the mat. " * 20)
    flags = [
        "--llm",
        tiny.decoder,
        "--speedrun",
        tiny.root,
        "--minutes",
        0.3,
        "--seeds",
        0,
        "--out",
        out,
        "--text",
        book,
    ]
    command(claims, *flags, "--only", "frozen", "full")
    measured, table = read_json(out / "claims.json"), (out / "claims.md").read_text()
    assert set(measured) == {"frozen, seed 0", "full, seed 0"}
    assert measured["frozen, seed 0"]["perplexity"] != measured["full, seed 0"]["perplexity"]
    assert "| the decoder must train in stage 2 | full - frozen: " in table and "one seed: open" in table
    with pytest.raises(SystemExit, match=r"was begun with --minutes 0\.3"):
        command(claims, *flags, "--minutes", 1)
