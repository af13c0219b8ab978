"""The layout of the repository: seven files at the top, rooms behind them, and who may import whom."""

import ast
import re
import tomllib

import pytest
from import_contract import REPOSITORY, check_imports, copy_as_packages, rooms

BOOK = ["clip", "data", "eval", "llava", "lora", "sample", "train"]
MAX_LINES = 60  # of a function: one screen


def source_files():
    """Return all Python files but the tests."""
    return [*REPOSITORY.glob("*.py"), *(path for room in rooms() for path in REPOSITORY.glob(f"{room}/**/*.py"))]


def test_exactly_seven_files_stand_at_the_top():
    assert sorted(path.stem for path in REPOSITORY.glob("*.py")) == BOOK


@pytest.mark.parametrize("word", ["autograd.Function", "ctypes", "os.environ", "getenv", "torch.ops."])
def test_the_seven_are_plain_pytorch(word):
    assert [name for name in BOOK if word in (REPOSITORY / f"{name}.py").read_text()] == []


@pytest.mark.parametrize("room", rooms())
def test_every_room_says_what_lives_there(room):
    assert ast.get_docstring(ast.parse((REPOSITORY / room / "__init__.py").read_text()))


def long_functions(source: str) -> list[str]:
    """Return "name (lines)" of every function that is longer than a screen."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    lengths = ((node.name, node.end_lineno - node.lineno + 1) for node in functions)
    return [f"{name} ({lines})" for name, lines in lengths if lines > MAX_LINES]


def test_long_functions_are_found():
    body = "    pass\n" * MAX_LINES
    assert long_functions(f"def short():\n{body[9:]}def long():\n{body}") == ["long (61)"]


def test_no_function_is_longer_than_a_screen():
    found = {str(path.relative_to(REPOSITORY)): long_functions(path.read_text()) for path in source_files()}
    assert {path: functions for path, functions in found.items() if functions} == {}


# ---------------------------------------------------------------------------------------------------------------------
# imports


def contract():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_the_contract_names_every_file_and_room_once():
    """A new room that the contract does not know would be free to import anything."""
    layers = [name for layer in contract()["contracts"][0]["layers"] for name in re.split(r"\s*[|:]\s*", layer)]
    assert sorted(layers) == sorted(contract()["root_packages"]) == sorted(BOOK + rooms())


def test_a_tool_finds_the_project():
    """`python tests/tools/X.py` searches its own folder only."""
    ours = {*BOOK, *rooms()}
    for path in (REPOSITORY / "tests/tools").glob("*.py"):
        text = path.read_text()
        imported = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
        if '__name__ == "__main__"' in text and ours.intersection(imported):
            assert "sys.path" in text, path


@pytest.fixture
def packages(tmp_path):
    """A copy of the source tree that import-linter accepts."""
    pytest.importorskip("importlinter")
    copy_as_packages(tmp_path)
    return tmp_path


def test_imports_point_down(packages):
    result = check_imports(packages)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("inputs/files.py", "import train", "inputs.files -> train"),
        ("clip/__init__.py", "from llava import Llava", "clip -> llava"),
        ("training/runs.py", "    from evaluation import metrics", "training.runs -> evaluation.metrics"),
        ("sample/__init__.py", "import eval", "sample -> eval"),
    ],
)
def test_an_import_that_points_up_is_found(packages, module, line, broken):
    """Also inside a function, and of a file from a file."""
    with (packages / module).open("a") as file:
        file.write(f"\n\ndef planted():\n    {line.strip()}\n" if line[0] == " " else f"\n{line}\n")
    result = check_imports(packages)
    assert result.returncode == 1 and broken in result.stdout
