"""Progress is one line on a real terminal, and lines elsewhere."""

import fcntl
import os
import pty
import struct
import sys
import termios

from cascade_model import status_line
from cascade_model.status_line import end_line, redraw, tell

END = "the end"


def sent(monkeypatch, act, kind="xterm"):
    """What `act` sends to stderr that is a terminal of 20 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with os.fdopen(theirs, "w") as file, monkeypatch.context() as patched:
        patched.setenv("TERM", kind)
        patched.setattr(sys, "stderr", file)
        patched.setattr(status_line, "_screen", status_line._Screen())
        act()
        file.write(END)
        file.flush()
        text = ""
        while END not in text:  # a terminal hands on what it gets when it finds the time
            text += os.read(ours, 1 << 16).decode()
    os.close(ours)
    return text.removesuffix(END).replace("\r\n", "\n")


def seen(text):
    """What stands on a screen in the end, by lines."""
    return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]


def test_progress_takes_the_place_of_the_progress_before_it(monkeypatch):
    shown = sent(monkeypatch, lambda: [redraw(f"step {step}") for step in range(5)])
    assert "\n" not in shown
    assert seen(shown) == ["step 4"]


def test_what_is_told_stays_and_so_does_the_progress_before_it(monkeypatch):
    def act():
        redraw("step 1")
        redraw("step 2")
        tell("one save failed")
        redraw("step 3")
        redraw("step 4")
        end_line()
        end_line()
        tell("done")

    shown = seen(sent(monkeypatch, act))
    assert shown == ["step 2", "one save failed", "step 4", "done", ""]


def test_a_line_is_cut_to_the_terminal_as_a_wrapped_one_cannot_be_redrawn(monkeypatch):
    assert seen(sent(monkeypatch, lambda: redraw("x" * 50))) == ["x" * 19]


def lines():
    redraw("step 1")
    redraw("step 2")
    tell("told")
    end_line()


def test_a_dumb_terminal_and_a_file_get_lines(monkeypatch, capsys):
    assert sent(monkeypatch, lines, kind="dumb") == "step 1\nstep 2\ntold\n"
    lines()
    assert capsys.readouterr().err == "step 1\nstep 2\ntold\n"
