"""lm-eval's `local-completions` against a real `cascade serve`, on local data, offline.

    make lm-eval [MODEL=folder]

Three kinds of task: multiple choice and rolling likelihood go by `echo` with `logprobs`, the third
writes text until a stop. Every likelihood that lm-eval was told is compared with the sequential
factorisation of the same model in this process. The control scores with another model's weights and
must disagree. lm-eval lives in an environment of its own (`--python`).
"""

import argparse
import json
import os
import random
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade_model.likelihood import sequential
from cascade_model.weights import load_model, require_text
from tests.benchmarks.report import Row, publish
from tests.benchmarks.serve_client import KEY
from tests.benchmarks.serve_runs import write_model
from tests.benchmarks.served import cascade_serve

TOLERANCE = 1e-4  # nats over a whole continuation; float32, other shapes of matrices

CHOICE = """\
task: served_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: served_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """\
task: served_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}\\n"
doc_to_target: "{{{{choices[label]}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"served_choice": CHOICE, "served_rolling": ROLLING, "served_writing": WRITING}


def write_data(folder: Path, count: int) -> None:
    """Lines of Python's own library: which one follows two others, and some as they stand."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py"
    lines = [line for line in source.read_text().splitlines() if 12 < len(line) < 60]
    draw = random.Random(0)
    with (folder / "choice.jsonl").open("w") as choice:
        for number in range(count):
            place = draw.randrange(len(lines) - 3)
            prompt = "\n".join(lines[place : place + 2])
            choices, label = draw.sample(lines, 3), number % 4
            choices.insert(label, lines[place + 2])
            # lm-eval counts white space at the prompt's end to the continuation.
            choices = [f"\n{line}" for line in choices]
            choice.write(json.dumps({"prompt": prompt, "choices": choices, "label": label}) + "\n")
    with (folder / "rolling.jsonl").open("w") as rolling:
        for number in range(max(1, count // 8)):
            text = "\n".join(lines[number * 2 : number * 2 + 3])
            rolling.write(json.dumps({"text": text}) + "\n")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.format(folder=folder.absolute()))


def evaluated(python: str, url: str, folder: Path, context: int) -> dict[str, Any]:
    """What lm-eval finds: its results by task, and its samples."""
    # `model_args` are comma-separated, so the key must hold none.
    told = f"model=served,base_url={url}/v1/completions,tokenizer_backend=remote,auth_token={KEY}"
    words = [python, "-m", "lm_eval", "--model", "local-completions", "--model_args"]
    words += [f"{told},max_length={context},num_concurrent=4,max_retries=1"]
    words += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--batch_size", "4"]
    words += ["--log_samples", "--output_path", str(folder / "told")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY}
    subprocess.run(words, env={**os.environ, **offline}, check=True)
    [results] = (folder / "told").rglob("results_*.json")
    found = {"results": json.loads(results.read_text())["results"]}
    for task in TASKS:
        [samples] = (folder / "told").rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in samples.read_text().splitlines()]
    return found


def differences(found: dict[str, Any], model: str) -> Iterator[float]:
    """Of every continuation, how far what lm-eval was told is from the factorisation here."""
    network, tokenizer = load_model(model)
    encode = require_text(tokenizer, model).encode
    network = network.eval()
    for sample in found["served_choice"]:
        for number, answered in enumerate(sample["resps"]):
            [[told, _]] = answered
            context, continuation = sample["arguments"][f"gen_args_{number}"].values()
            prompt, whole = encode(context), encode(context + continuation)
            own = float(sequential(network, prompt, whole[len(prompt) :]).sum())
            yield abs(float(told) - own)


def main() -> int:
    """Run and compare; the exit code."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--python", required=True, help="of an environment with lm-eval[api]")
    flags.add_argument("--model", help="a model folder; none: a tiny one with random weights")
    flags.add_argument("--count", type=int, default=100, help="questions of multiple choice")
    given = flags.parse_args()
    folder = Path("build/lm-eval/run").absolute()
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    write_data(folder, given.count)
    model = given.model or write_model(folder / "model", max_sequence_length=512)
    with cascade_serve(model, folder / "serve.log") as server:
        found = evaluated(given.python, server.url, folder, context=512)
    own = list(differences(found, model))
    other = list(differences(found, write_model(folder / "other", seed=1, max_sequence_length=512)))
    results = found["results"]
    choice, rolling = results["served_choice"], results["served_rolling"]
    wrote = [sample["resps"][0][0] for sample in found["served_writing"]]
    rows = [
        Row("multiple choice: continuations scored", len(own), "", bar=4 * given.count),
        Row("... farthest from the factorisation here", max(own), "nats", TOLERANCE, True),
        Row("... acc", choice["acc,none"], f"± {choice['acc_stderr,none']:.3f}"),
        Row("... acc_norm", choice["acc_norm,none"], f"± {choice['acc_norm_stderr,none']:.3f}"),
        Row("rolling likelihood: bits per byte", rolling["bits_per_byte,none"], ""),
        Row("until a stop: texts", len(wrote), "", bar=given.count),
        Row("... with the stop in them", sum("\n" in text for text in wrote), "", 0, True),
        Row("control: farthest from another model's", max(other), "nats", bar=100 * TOLERANCE),
    ]
    return publish("lm-eval", rows, model=given.model or "tiny, random", count=given.count)


if __name__ == "__main__":
    raise SystemExit(main())
