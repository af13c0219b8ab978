"""The table of connectors: its plan, its records, its differences, and a tiny run from end to end, twice."""

import argparse
import json
from pathlib import Path

import pytest

from inputs.files import read_json
from variants.connectors import CONNECTORS
from world import connectors
from world.connector_report import Cell, describe_difference
from world.connectors import Plan, choose_best


def arguments(**values) -> argparse.Namespace:
    usual = {"out": Path("out/c"), "speedrun": Path("out/s"), "minutes": 10, "patch_size": 12, "budgets": [36, 9, 4]}
    usual |= {"only": ["linear", "mlp2x_gelu", *CONNECTORS], "seeds": [0, 1, 2], "size": "small", "dtype": "float32"}
    return argparse.Namespace(**usual | values)


def test_runs_differ_in_connector_tokens_and_seed_only():
    plan = Plan(arguments())
    cells = plan.cells()
    assert len({(cell.kind, cell.tokens) for cell in cells}) == len(cells)
    kinds = {tokens: {cell.kind for cell in cells if cell.tokens == tokens} for tokens in (36, 9, 4)}
    assert kinds[9] == kinds[4] and kinds[9] | kinds[36] == {"linear", "mlp2x_gelu", *CONNECTORS} - {"expand"}
    assert "avg_pool" not in kinds[36] and "linear" not in kinds[9] and "resampler" in kinds[36] & kinds[9]
    commands = {}
    for cell in cells:
        for seed in (0, 1):
            text = " | ".join(" ".join(step.command) for step in plan.cell(cell, seed))
            text = text.replace(f"{cell.folder}/seed{seed}", "CELL").replace(f"--seed {seed}", "--seed S")
            commands[text.replace(f" --projector {cell.kind}", "").replace(f" --visual-tokens {cell.tokens}", "")] = (
                cell
            )
    assert len(commands) == 1
    steps = [*plan.towers(), *plan.curve(), *(step for cell in cells for step in plan.cell(cell, 0))]
    assert len({step.name for step in steps}) == len(steps)
    assert not plan.draw() and Plan(arguments(speedrun=None)).draw()


def write_answers(cell: Cell, scores: dict[int, list[float]]) -> Cell:
    for seed, values in scores.items():
        rows = [{"question_id": i, "metadata": {"category": "a", "score": score}} for i, score in enumerate(values)]
        path = cell.folder / f"seed{seed}/stage2/answers.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell.seeds = list(scores)
    return cell


def test_differences_and_the_best(tmp_path):
    """Ten questions: paired by seed if both have several, else by question."""
    right = {f"{n}": [1.0] * n + [0.0] * (10 - n) for n in range(11)}
    best = write_answers(Cell("a", 4, tmp_path / "a"), {0: right["8"], 1: right["8"], 2: right["9"]})
    near = write_answers(Cell("b", 4, tmp_path / "b"), {0: right["7"], 1: right["9"], 2: right["8"]})
    less = write_answers(Cell("c", 4, tmp_path / "c"), {0: right["2"], 1: right["1"], 2: right["3"]})
    once = write_answers(Cell("d", 4, tmp_path / "d"), {0: right["7"]})
    far = write_answers(Cell("e", 9, tmp_path / "e"), {0: right["1"]})
    assert describe_difference(best, best) == "best"
    assert describe_difference(near, best) == "none (-3.3 ± 6.7)"
    assert describe_difference(less, best) == "-63.3 ± 3.3"
    assert describe_difference(once, best) == "none (-10.0 ± 10.0), first seed"
    assert choose_best([less, near, best, once, far], [4]) == [best, near, once]


def test_a_tiny_table_and_the_same_command_again(tiny, tmp_path, command, in_process, monkeypatch, capsys):
    monkeypatch.setattr(connectors, "METHODS", ("random", "fastv:1"))
    monkeypatch.setattr("world.connector_report.ROUNDS", 1)
    flags = ["--speedrun", tiny.root, "--minutes", 0.1, "--patch-size", 24, "--budgets", 9, 1, "--size", "tiny"]
    flags += ["--seeds", 0, 1, "--only", "linear", "avg_pool", "--out", tmp_path / "out"]
    command(connectors, *flags)
    report, text = read_json(tmp_path / "out/report.json"), (tmp_path / "out/report.md").read_text()
    assert [(row["connector"], row["budget"]) for row in report["connectors"]] == [("linear", 9), ("avg_pool", 1)]
    seeds = {row["budget"]: list(row["seeds"]) for row in report["connectors"]}
    assert seeds == {9: ["0"], 1: ["0", "1"]} and all(row["step_ms"] > 0 for row in report["connectors"])
    assert set(report["budgets"]) == {"random", "fastv", "pool, nested training"}
    assert all(set(values) == {"9", "1"} for values in report["budgets"].values())
    assert "| avg_pool | 1 | 1 | 2 |" in text and text.strip() in capsys.readouterr().out
    records = json.loads((tmp_path / "out/records/instruct.json").read_text())
    assert records and all(len(record["conversations"]) in (2, 4) for record in records)
    count = len(in_process)
    command(connectors, *flags)
    assert len(in_process) == count
    with pytest.raises(SystemExit, match=r"was begun with --minutes 0\.1"):
        command(connectors, *flags, "--minutes", 1)


def test_a_default_call_begins_with_a_world_of_its_own(tmp_path, command, monkeypatch):
    begun = []

    def stop(steps, *_):
        begun.extend(steps)
        raise SystemExit("stopped here")

    monkeypatch.setattr(connectors, "run_steps", stop)
    with pytest.raises(SystemExit, match="stopped here"):
        command(connectors, "--out", tmp_path / "out")
    assert begun[0].command[:3] == ["-m", "world", "write"]
    with pytest.raises(SystemExit, match="was begun with --minutes"):
        command(connectors, "--out", tmp_path / "out", "--minutes", 1)
