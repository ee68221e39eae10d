"""All stages on one small real corpus, on local Ray: what `make demo` runs.

The corpus is the source text of the Python standard library, which every machine with Python has
(PSF licence). Each stage is the same command that a user types; this file only calls them in order,
measures them and prints the table.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_model.errors import InputError
from cascade_model.stopping import sigterm_held_off
from jobs.cli import command

RECIPES = Path(__file__).parent / "recipes" / "demo"
SAMPLING = {"temperature": 0.7, "seed": 1}
LEAST_GAIN = 0.3  # nats per token below an add-one unigram model; less is no model of the text
PROMPTS = ("def read_file(path):\n", "import os\n\nclass ", "    if not isinstance(")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The demonstration: corpus, teacher, pretraining, distillation, generation, endpoint."""

    output: str = "runs/demo"
    """The run folder; a finished stage is not done again."""
    prompts: tuple[str, ...] = PROMPTS
    """Texts to continue, offline and through the endpoint."""


def run(config: DemoConfig) -> dict[str, Any]:
    """Run every stage and print the table; the summary stands in <output>/summary.json too."""
    from cascade_model.commit import require_writable
    from cascade_model.run_record import SUMMARY

    require_writable(config.output)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    corpus, steps = folder / "corpus", Timer()
    steps.stage("prepare", "--output", corpus)
    steps.stage("pretrain", "--corpus", corpus, "--output", folder / "teacher", recipe="teacher")
    steps.stage("pretrain", "--corpus", corpus, "--output", folder / "pretrain")
    student = ["--teacher", folder / "teacher/model", "--initial-model", folder / "pretrain/model"]
    steps.stage("distil", "--corpus", corpus, "--output", folder / "distil", *student)
    measured = {}
    for name in ("teacher", "pretrain", "distil"):
        report = folder / f"evaluation-{name}.json"
        steps.stage(
            "evaluate", "--model", folder / name, "--corpus", corpus, "--output", report, name=name
        )
        measured[name] = json.loads(report.read_text())
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in config.prompts))
    model = folder / "distil/model"
    steps.stage(
        "generate", "--model", model, "--input", prompts, "--output", folder / "completions"
    )
    answer = steps.measure("serve", lambda: ask_endpoint(model, config.prompts[0], folder))
    summary = summarise(folder, measured, answer, steps.seconds, time.perf_counter() - began)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2))
    print(table(summary))
    require_gain(summary)
    return summary


class Timer:
    """Runs stages as commands of their own and keeps their wall times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, stage: str, *flags: Any, recipe: str | None = None, name: str = "") -> None:
        """`python -m jobs.<stage> --config jobs/recipes/demo/<recipe>.yaml FLAGS`."""
        words = [sys.executable, "-m", f"jobs.{stage}", "--config"]
        words += [str(RECIPES / f"{recipe or stage}.yaml"), *map(str, flags)]
        key = " ".join(filter(None, (stage, recipe or name)))
        print(f"\n$ {' '.join(words[1:])}", flush=True)
        code = self.measure(key, lambda: _run(words))
        if code:
            raise InputError(
                f"the stage `{stage}` ended with code {code}; its message stands above"
            )

    def measure(self, key: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - began
        return result


def _run(words: list[str]) -> int:
    """The exit code of a stage."""
    with _started(words) as stage:
        return stage.wait()


@contextlib.contextmanager
def _started(words: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that is asked to stop, and waited for, when the body does not wait for its end."""
    process = None
    try:
        with sigterm_held_off():  # a process that nobody knew of would run on
            process = subprocess.Popen(words, **options)
        yield process
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def ask_endpoint(model: Path, prompt: str, folder: Path) -> dict[str, Any]:
    """Start `cascade serve` on a free loopback port, ask it once, end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "jobs.serve", "--config", str(RECIPES / "serve.yaml")]
    words += ["--model", str(model), "--port", str(port)]
    key = os.urandom(16).hex()
    print(f"\n$ {' '.join(words[1:])}", flush=True)
    with open(folder / "serve.log", "w") as log:
        environment = {**os.environ, "CASCADE_API_KEYS": key}
        with _started(words, env=environment, stdout=log, stderr=log) as server:
            body = {"model": "cascade", "prompt": prompt, "max_tokens": 48, **SAMPLING}
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server, folder / "serve.log")
            return call(f"{url}/v1/completions", key, body)


def wait_until_ready(url: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Poll /health; the server's own words are shown when it ends early."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise InputError(f"the endpoint ended with code {server.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise InputError(f"the endpoint was not ready within {seconds:.0f} s; see {log}")


def call(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """One POST with a key; the JSON answer."""
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def summarise(
    folder: Path,
    measured: dict[str, dict[str, Any]],
    answer: dict[str, Any],
    seconds: dict[str, float],
    total: float,
) -> dict[str, Any]:
    """Gather what the stages left behind in their own files."""
    from cascade_model.run_record import SUMMARY

    manifest = json.loads((folder / "corpus/manifest.json").read_text())
    runs = {name: json.loads((folder / name / SUMMARY).read_text()) for name in measured}
    rows = completions_in(folder / "completions")
    train = manifest["splits"]["train"]
    return {
        "documents": train["num_documents"],
        "tokens": train["num_tokens"],
        "sequences": train["num_sequences"],
        "runs": runs,
        "evaluations": measured,
        "completions": rows,
        "endpoint": answer,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(total, 1),
        "folder": str(folder),
    }


def completions_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of every file that the manifest vouches for."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    lines = [line for file in files for line in (folder / file["object"]).read_text().splitlines()]
    return [json.loads(line) for line in lines]


def table(summary: dict[str, Any]) -> str:
    """What happened, for a person."""
    tokens, sequences, documents = (
        f"{summary[key]:,} {key}" for key in ("tokens", "sequences", "documents")
    )
    rows = [("prepared", f"{tokens} in {sequences} of {documents}")]
    names = {"teacher": "teacher, B = 1", "pretrain": "block diffusion", "distil": "distilled"}
    for name, title in names.items():
        run = summary["runs"][name]
        speed, losses = run["tokens_per_second"], (run["first_loss"], run["last_loss"])
        values = summary["evaluations"][name]
        held_out = "held-out likelihood" if values["is_exact"] else "held-out bound"
        rows.append((f"{title}: trained", f"{run['tokens']:,} tokens at {speed:,.0f}/s"))
        rows.append(("  loss before -> after", "{:.3f} -> {:.3f}".format(*losses)))
        rows.append((f"  {held_out}", f"{nats(values)}, {values['nats_per_byte']:.3f} nats/byte"))
    last = summary["evaluations"]["distil"]
    rows.append(("untrained model", nats(last["untrained"])))
    rows.append(("unigram, add-one", f"{last['unigram_nats_per_token']:.3f} nats/token"))
    rows.append(("  distilled below it by", f"{last['below_unigram']:.3f} nats/token"))
    made, passes = (sum(r[key] for r in summary["completions"]) for key in ("num_tokens", "passes"))
    rows.append(("tokens per forward", f"{made / passes:.2f} ({made} tokens, {passes} passes)"))
    for row in summary["completions"]:
        rows.append(("sample", json.dumps(row["prompt"] + " ⟶ " + row["completion"][:60])))
    choice = summary["endpoint"]["choices"][0]
    rows.append(("endpoint answered", json.dumps(choice["text"][:60])))
    rows.append(("  usage", json.dumps(summary["endpoint"]["usage"])))
    spent = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    rows.append(("seconds", f"{summary['total_seconds']:.0f} ({spent})"))
    rows.append(("run folder", summary["folder"]))
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def require_gain(summary: dict[str, Any]) -> None:
    """Raise `InputError` unless the distilled model is well below the unigram model."""
    gain = summary["evaluations"]["distil"]["below_unigram"]
    if not gain >= LEAST_GAIN:
        raise InputError(
            f"the distilled model is {gain:.3f} nats per token below the unigram model, and the "
            f"demonstration asks for {LEAST_GAIN}; remove {summary['folder']} and run it again"
        )


def nats(values: dict[str, Any]) -> str:
    """A held-out value with its standard error."""
    return f"{values['nats_per_token']:.3f} ± {values['standard_error']:.3f} nats/token"


main = command(DemoConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
