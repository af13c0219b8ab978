"""The figures are drawn at a size and on a background that a README can show; the report says what a run gave."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from world.report import write_report
from world.scenes import make_scene

ROOT = Path(__file__).parents[2]
ALWAYS = {"architecture.png", "freeze_plan.png", "tokens_and_mask.png"}
WITH_RUN = ALWAYS | {"loss_curves.png", "heldout_sheet.png"}


@pytest.fixture
def run(tiny, tmp_path):
    """The tiny run as a speedrun leaves it: with answers, right, partly right and wrong, in the folder of stage 2."""
    folder = tmp_path / "run"
    (folder / "stage2").mkdir(parents=True)
    for path in tiny.root.iterdir():
        if path.name != "stage2":
            (folder / path.name).symlink_to(path)
    (folder / "stage2-frozen").symlink_to(tiny.stage2)
    for path in tiny.stage2.iterdir():
        (folder / "stage2" / path.name).symlink_to(path)
    rows = [json.loads(line) for line in (tiny.world / "questions.jsonl").read_text().splitlines()]
    answers = [
        {
            "question_id": row["question_id"],
            "prompt": row["text"],
            "text": row["answer"] if i % 3 == 0 else "a small red star in the top left and so on " * 5 * (i % 3 - 1),
            "metadata": {"category": row["category"], "score": (1.0, 0.5, 0.0)[i % 3]},
        }
        for i, row in enumerate(rows)
    ]
    (folder / "stage2/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


def check_image(path: Path):
    with Image.open(path) as image:
        assert image.mode == "RGBA" and image.width >= 1000 and image.height >= 500
        assert image.getpixel((0, 0))[3] == 0  # the page shows at the corners
        pixels = np.array(image.resize((200, 100))).reshape(-1, 4)
        assert len(np.unique(pixels[pixels[:, 3] == 255], axis=0)) > 50  # and something is drawn on the card


def test_all_figures_are_drawn_from_a_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from world.figures import draw_figures

    draw_figures(run, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == WITH_RUN
    for name in WITH_RUN:
        check_image(tmp_path / "figures" / name)
    assert len(capsys.readouterr().out.splitlines()) == len(WITH_RUN)


def test_without_a_run_two_figures_are_left_out_with_a_line_each(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from world.figures import draw_figures

    draw_figures(tmp_path / "nowhere", tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == ALWAYS
    output = capsys.readouterr().out
    assert all(f"{name} is not drawn: {tmp_path / 'nowhere'}" in output for name in WITH_RUN - ALWAYS)


def test_without_matplotlib_one_line_says_so(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from inputs import cli; from world import figures; "
    code += f"sys.argv[1:] = ['--out', {str(tmp_path / 'figures')!r}]; cli.run(figures.main, 'figures.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "figures").exists()
    assert done.stderr.startswith("figures.py: matplotlib is not installed") and len(done.stderr.splitlines()) == 1


def test_the_report_names_accuracies_and_minutes(run):
    (run / "stage2/answers-blank.jsonl").write_bytes((run / "stage2/answers.jsonl").read_bytes())
    write_report(run, {"world": 1.0, "stage2": 2.5, "no-stage1": 4.0}, dial=3)
    result = json.loads((run / "report.json").read_text())
    assert result["minutes"] == 3.5 and result["dial"] == 3  # the ablation is beyond the minutes
    assert result["accuracy"]["overall"] == result["blind"]["overall"] == pytest.approx(52.5)  # of 7, 7 and 6 answers
    assert set(result["stages"]) == {"stage0/clip", "stage0/decoder", "stage1", "stage2-frozen", "stage2"}
    text = (run / "report.md").read_text()
    assert "| overall | 52.5 % | 52.5 % |" in text and "| stage2 | 2.5 |" in text
    check_image(run / "sheet.png")


def test_the_answer_in_the_figure_of_the_architecture_is_true():
    pytest.importorskip("matplotlib")
    from world.figures import ANSWER, SCENE

    (star,) = (obj for obj in make_scene(0, SCENE, held_out=False)[0].objects if obj.shape == "star")
    assert ANSWER[:4] == ["The", "star", "is", f"{star.color}."]
