"""Errors that a user can fix end in one line and a status; bugs keep their traceback."""

import argparse

import pytest

from inputs.cli import above_zero, run, seed
from inputs.images import BadImage


def raiser(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("--steps must be at least 1"), "tool.py: --steps must be at least 1"),
        (ValueError("two\nlines"), "tool.py: two lines"),
        (BadImage("a.jpg: cut short"), "tool.py: a.jpg: cut short"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "tool.py: a.json: No such file or directory"),
        (OSError("no space left"), "tool.py: no space left"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_status_1(error, line):
    with pytest.raises(SystemExit) as caught:
        run(raiser(error), "tool.py")
    assert caught.value.code == line  # Python prints a string on stderr and exits with status 1


def test_ctrl_c_is_one_line_and_status_130(capsys):
    with pytest.raises(SystemExit) as caught:
        run(raiser(KeyboardInterrupt()), "tool.py")
    assert caught.value.code == 130 and capsys.readouterr().err == "tool.py: interrupted\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raiser(ZeroDivisionError("division by zero")), "tool.py")


def test_main_runs_once_and_may_exit_with_its_own_status():
    calls = []
    run(lambda: calls.append(1), "tool.py")
    with pytest.raises(SystemExit) as caught:
        run(raiser(SystemExit(3)), "tool.py")
    assert calls == [1] and caught.value.code == 3


@pytest.mark.parametrize("text", ["-1", "1048576", "20261130", "1.5", "one", "²", ""])
def test_a_seed_is_a_whole_number_of_twenty_bits(text):
    assert seed("0") == 0 and seed("1048575") == 2**20 - 1
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 0 to 1,048,575"):
        seed(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_a_number_above_zero_is_finite(text):
    assert above_zero("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0"):
        above_zero(text)
