"""SIGTERM to real commands, at recorded points: one sentence, code 75, nothing held, nothing left.

Before Python has come to the handler, which is in its first tenth of a second, a SIGTERM ends the
process without a word; nothing is written by then.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cascade_model.tokenizer import Tokenizer
from jobs import evaluate, generate, prepare, pretrain
from tests.tiny_models import saved_text_model

SENTENCE = "stopped by SIGTERM; what was committed stays, run the same command to go on"
SHAPE = ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-heads", "2"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.intermediate-size", "32"]
STEPS = ["--trainer.sequences-per-step", "2", "--trainer.sequences-per-forward", "2"]
NUM_ROWS, ROWS_PER_PART = 140, 2  # seconds of work, so that a signal finds some of it undone


@dataclass(frozen=True)
class Command:
    """A command that runs; it and all that it starts carry the same mark."""

    process: subprocess.Popen
    mark: bytes

    @property
    def pid(self) -> int:
        """The command's own process."""
        return self.process.pid

    def alive(self) -> dict[int, str]:
        """What lives of it and of its children's children, also where their parent has gone."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_bytes():
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = words
            except OSError:
                continue
        return {pid: words for pid, words in found.items() if words}


@contextmanager
def running(*words: str) -> Iterator[Command]:
    """`cascade WORDS`, ended on leaving with all that it started."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "jobs.cascade", *words]
    environment = {**os.environ, "MARK": mark}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, process_group=0
    )
    started = Command(process, mark.encode())
    try:
        yield started
    finally:
        process.kill()
        for pid in started.alive():
            os.kill(pid, signal.SIGKILL)


Point = Callable[[Command], object]


def handler_is_there(command: Command) -> bool:
    return handles(command.pid)


def handles(pid: int) -> bool:
    """As the kernel tells it: Python itself handles no SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


def first_child(command: Command) -> bool:
    """Ray has begun to start: the child is its first process."""
    return bool(children(command))


def ray_has_its_server(command: Command) -> bool:
    """Its first process is up, as the next one is only begun then."""
    return len(children(command)) > 1


def stage_handles(command: Command) -> bool:
    """The demonstration runs a stage, which has a handler of its own."""
    return any(is_stage(pid) and handles(pid) for pid in children(command))


def is_stage(pid: int) -> bool:
    """And no copy of the demonstration any more, which its child is for a moment."""
    return b"jobs.prepare" in Path(f"/proc/{pid}/cmdline").read_bytes()


def children(command: Command) -> list[int]:
    found = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    return [int(pid) for pid in found.read_text().split()]


def torch_is_being_loaded(command: Command) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{command.pid}/maps").read_text()


def has_worked(seconds: float) -> Point:
    def point(command: Command) -> bool:
        times = Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()
        return int(times[11]) + int(times[12]) >= seconds * os.sysconf("SC_CLK_TCK")

    return point


def there_is(folder: Path, pattern: str) -> Point:
    return lambda command: next(folder.glob(pattern), None)


def terminated(
    point: Point, *words: str, again_every: float | None = None, to_group: bool = False
) -> str:
    """Send a SIGTERM at a point, check how the command ends; what it said on stderr.

    More of them come every so many seconds, if they are to; or it goes to the process group.
    """
    with running(*words) as command:
        deadline = time.monotonic() + 240
        while not point(command):
            assert command.process.poll() is None, command.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        (os.killpg if to_group else os.kill)(command.pid, signal.SIGTERM)
        while again_every and command.process.poll() is None:
            time.sleep(again_every)
            command.process.send_signal(signal.SIGTERM)
        error = command.process.communicate(timeout=120)[1]
        assert command.process.returncode == 75, error
        assert "Traceback" not in error
        assert again_every or "SIGTERM received" not in error  # Ray's stack
        deadline = time.monotonic() + 120  # Ray's own processes end a moment after their command
        while (left := command.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    return " ".join(error.replace("│", " ").split())


@pytest.fixture(scope="module")
def model(tiny_corpus, tmp_path_factory) -> str:
    tokenizer = Tokenizer.from_file(f"{tiny_corpus}/tokenizer.json")
    return saved_text_model(tmp_path_factory.mktemp("model") / "model", tokenizer)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a {row}"}) + "\n" for row in range(NUM_ROWS)))
    return path


def preparing(documents: Path, output: Path, runner: str = "local") -> list[str]:
    words = ["--output", str(output), "--source.paths", str(documents), "--runner", runner]
    words += ["--tokenizer", "train", "--vocab-size", "512", "--sequence-length", "64"]
    return [*words, "--noise.block-size", "4", "--held-out-rate", "0.1"]


def training(corpus: str, output: Path, workers: int, steps: int = 2) -> list[str]:
    words = ["--corpus", corpus, "--output", str(output), "--num-workers", str(workers)]
    return [*words, *SHAPE, *STEPS, "--trainer.num-steps", str(steps)]


def generating(model: str, prompts: Path, output: Path) -> list[str]:
    words = ["--model", model, "--input", str(prompts), "--output", str(output)]
    words += ["--rows-per-shard", str(ROWS_PER_PART), "--num-workers", "2"]
    words += ["--threads-per-worker", "1", "--sampling.max-tokens", "60"]
    return [*words, "--sampling.stop-at-eos", "False"]


EVERY_LINE = """
import contextlib, os, signal, sys
from cascade_model import stopping
from jobs import ending

FILES = {module.__file__ for module in (ending, stopping, contextlib)}
if sys.argv[2] == "loose":
    stopping._Interrupt.hold_off = lambda self: None


@ending.ended_by_signals
def main(argv):
    if sys.argv[1] == "again":
        os.kill(os.getpid(), signal.SIGTERM)
    return 0


def end(place):
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if frame.f_code.co_filename not in FILES:
            return None
        lines += event == "line"
        if event == "line" and lines == place:
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        code = main()
    except BaseException:
        code = 1
    sys.settrace(None)
    os._exit(code if lines >= place else 99)


place, code = 0, None
while code != 99:
    place += 1
    child = os.fork() or end(place)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code)
"""


def ends_at_every_line(*words: str) -> list[int]:
    """How a command ends if SIGTERM comes before the first line around it, the second and so on.

    The same code many times in a row is given once; 1 is an exception that got out.
    """
    command = [sys.executable, "-c", EVERY_LINE, *words]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    codes = [int(line) for line in printed.split()]
    assert len(codes) > 30
    assert codes.pop() == 99  # no such line any more
    return [code for code, _ in itertools.groupby(codes)]


def test_at_every_line_around_a_command():
    """No handler yet; stopped, whether or not it has begun; done, which no signal makes undone."""
    before, done = -signal.SIGTERM, 0
    assert ends_at_every_line("once", "held") == [before, 75, done]
    assert ends_at_every_line("again", "held") == [before, 75]
    assert 1 in ends_at_every_line("once", "loose")


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "evaluate", "generate", "serve"])
def test_as_soon_as_there_is_a_handler(
    stage, tiny_corpus, documents_jsonl, model, prompts, tmp_path
):
    output = tmp_path / "output"
    words = {
        "prepare": preparing(documents_jsonl, output),
        "pretrain": training(tiny_corpus, output, 2),
        "evaluate": ["--model", model, "--corpus", tiny_corpus, "--output", str(output)],
        "generate": generating(model, prompts, output),
        "serve": ["--model", model, "--no-auth", "True", "--port", "1"],
    }
    assert terminated(handler_is_there, stage, *words[stage]) == SENTENCE
    assert not output.exists()


def test_in_the_middle_of_prepare_and_the_next_run_makes_the_same_corpus(
    tiny_corpus, documents_jsonl, tmp_path
):
    words = preparing(documents_jsonl, tmp_path / "corpus")
    begun = there_is(tmp_path / "corpus/_work", "job.json")
    assert terminated(begun, "prepare", *words) == SENTENCE
    assert not (tmp_path / "corpus/manifest.json").exists()
    assert prepare.main(words) == 0
    made, whole = (Path(folder, "manifest.json") for folder in (tmp_path / "corpus", tiny_corpus))
    assert json.loads(made.read_text())["digest"] == json.loads(whole.read_text())["digest"]


@pytest.mark.parametrize("point", [torch_is_being_loaded, has_worked(4)])
def test_in_the_middle_of_evaluate(point, tiny_corpus, model, tmp_path):
    report = tmp_path / "report.json"
    words = ["--model", model, "--corpus", tiny_corpus, "--output", str(report)]
    words += ["--max-sequences", "16", "--untrained", "False", "--draws"]
    assert terminated(point, "evaluate", *words, "100000") == SENTENCE
    assert not report.exists()
    assert evaluate.main([*words, "1"]) == 0
    assert report.exists()


def leases(run: Path) -> list[bool]:
    return [json.loads(path.read_text())["is_released"] for path in run.glob("lease-*.json")]


def test_when_a_run_has_just_taken_its_folder(tiny_corpus, tmp_path):
    """Before its loop is there, or in its first steps, which are saved then."""
    run = tmp_path / "run"
    words = training(tiny_corpus, run, 0, steps=1_000_000)
    said = terminated(there_is(run, "lease-*.json"), "pretrain", *words)
    assert SENTENCE in said or re.search(r"stopped at step \d+ \(SIGTERM\)", said)
    assert leases(run) == [True]
    assert pretrain.main(training(tiny_corpus, run, 0)) == 0


@pytest.mark.ray
@pytest.mark.parametrize(
    ("point", "to_group"),
    [(first_child, False), pytest.param(ray_has_its_server, True, marks=pytest.mark.slow)],
)
def test_while_ray_starts_for_a_training(point, to_group, tiny_corpus, tmp_path, ray_local):
    run = tmp_path / "run"
    words = training(tiny_corpus, run, 2)
    assert terminated(point, "pretrain", *words, to_group=to_group) == SENTENCE
    assert leases(run) in ([], [True])
    assert pretrain.main(words) == 0
    assert (run / "summary.json").exists()


@pytest.mark.parametrize(("point", "times"), [(first_child, {1, 2}), (stage_handles, {2})])
def test_the_demonstration_asks_its_stage_to_stop(point, times, tmp_path):
    """A stage without a handler yet says nothing."""
    said = terminated(point, "demo", "--output", str(tmp_path / "demo"))
    assert said.count(SENTENCE) in times, said
    assert not (tmp_path / "demo/corpus/manifest.json").exists()


@pytest.mark.ray
def test_in_the_middle_of_generate_and_the_next_run_goes_on(model, prompts, tmp_path, ray_local):
    output = tmp_path / "output"
    words = generating(model, prompts, output)
    said = terminated(there_is(output, "completions-*"), "generate", *words)
    told = re.search(r"stopped by SIGTERM when (\d+) of 140 rows were answered; they stay", said)
    assert told, said
    assert "run the same command again, which goes on from there" in said
    kept = {path: path.read_bytes() for path in output.glob("completions-*")}
    assert int(told[1]) / ROWS_PER_PART <= len(kept) < NUM_ROWS / ROWS_PER_PART
    assert generate.main(words) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    assert counts["rows_out"] == NUM_ROWS


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("stage", ["prepare", "generate", "serve"])
def test_while_ray_starts(stage, documents_jsonl, model, prompts, tmp_path, ray_local):
    output = tmp_path / "output"
    words = {
        "prepare": preparing(documents_jsonl, output, "ray"),
        "generate": generating(model, prompts, output),
        "serve": ["--model", model, "--no-auth", "True", "--port", "0"],
    }
    said = terminated(first_child, stage, *words[stage])
    assert "stopped by SIGTERM" in said
    if stage != "serve":
        assert {"prepare": prepare, "generate": generate}[stage].main(words[stage]) == 0


@pytest.mark.slow
@pytest.mark.ray
def test_many_of_them_from_the_start_of_ray_to_the_end_of_the_command(
    documents_jsonl, tmp_path, ray_local
):
    """Some of them meet the moment in which Ray's C++ handler is there: it prints its stack."""
    words = preparing(documents_jsonl, tmp_path / "corpus", "ray")
    said = terminated(first_child, "prepare", *words, again_every=0.05)
    assert said.count("stopped by SIGTERM") == 1
    assert prepare.main(words) == 0
