"""One line on a terminal, written anew; a line now and then where nobody watches."""

import io

import pytest

from pipelines.progress import Progress, clock_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(stream, steps):
    """Parts of 50 tokens, one after each of the given seconds."""
    clock = Clock()
    progress = Progress("pack", len(steps) + 2, stream, clock)
    for seconds in steps:
        clock.now += seconds
        progress.add(50)
    progress.close()
    return stream.getvalue()


def test_a_line_every_ten_seconds_where_nobody_watches():
    shown = run(io.StringIO(), [4, 4, 4, 4, 4])
    assert shown.splitlines() == ["pack  3/7 parts  12 tokens/s  0:16 left"]


def test_a_short_job_says_nothing_where_nobody_watches():
    assert run(io.StringIO(), [1, 1, 1]) == ""


def test_on_a_terminal_one_line_is_written_anew():
    shown = run(Terminal(), [1, 0.01, 1])
    assert shown.count("\n") == 1
    assert [part.strip() for part in shown.split("\r\x1b[2K")[1:]] == [
        "pack  1/5 parts  50 tokens/s  0:04 left",
        "pack  3/5 parts  75 tokens/s  0:01 left",
        "pack  3/5 parts  75 tokens/s  0:01 left",
    ]


def test_a_round_without_tokens_shows_no_speed():
    progress = Progress("hash", 2, io.StringIO(), Clock())
    progress.add()
    assert progress.line(101.0) == "hash  1/2 parts  0:01 left"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (67, "1:07"), (3723, "1:02:03")])
def test_time_is_written_as_on_a_clock(seconds, text):
    assert clock_text(seconds) == text


def test_rows_tell_their_speed_and_those_of_an_earlier_run_do_not_count_for_it():
    progress = Progress("generate", 1000, io.StringIO(), Clock(), unit="rows")
    progress.resume(400)
    assert progress.line(101.0) == "generate  400/1,000 rows  0.0 rows/s  0:00 left"
    progress.add(tokens=640, count=100)
    told = "generate  500/1,000 rows  10.0 rows/s  64 tokens/s  0:50 left"
    assert progress.line(110.0) == told


def test_the_time_in_which_nobody_was_ready_is_no_part_of_the_speed():
    clock = Clock()
    progress = Progress("generate", 100, io.StringIO(), clock, unit="rows")
    clock.now += 60
    for _ in range(2):
        progress.began(5.0)  # the first one tells
        progress.add(tokens=50, count=10)
    assert progress.line(clock.now) == "generate  20/100 rows  4.0 rows/s  20 tokens/s  0:20 left"
