"""Check the import contract of pyproject.toml with import-linter.

    python tests/tools/import_contract.py       prints the broken imports; status 1 if there are any

import-linter reads packages, not single files. So it runs on a copy of the source tree in which every top-level file
X.py is the package X/__init__.py. All our imports are absolute, so they mean the same there.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def rooms() -> list[str]:
    """Return the names of the top-level packages."""
    return sorted(path.parent.name for path in REPOSITORY.glob("*/__init__.py"))


def copy_as_packages(target: Path):
    """Copy rooms and top-level files into a folder, each file as a package of its name."""
    for name in rooms():
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.glob("*.py"):
        (target / path.stem).mkdir()
        shutil.copy(path, target / path.stem / "__init__.py")


def check_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter in a folder that `copy_as_packages` wrote."""
    command = [sys.executable, "-c", LINT, "--no-cache", str(REPOSITORY / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def main():
    """Check the tree as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy_as_packages(Path(folder))
        result = check_imports(Path(folder))
    print(result.stdout + result.stderr)
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
