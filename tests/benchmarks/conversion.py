"""bench-conversion: SmolLM2-135M to block diffusion, several ways at equal tokens, data and seed.

    make bench-conversion                   # what is there already is not done again
    make bench-conversion BETTER=aligned    # vary the other axis

Each arm is a command of the product, so it can be cut at any time and goes on where it was; its
held-out bound is measured on the way by the training itself. Beside the arms stands the control:
the same tokens for the autoregressive parent as it is. An arm costs about 25 minutes of one core.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.conversion_report import report
from tests.benchmarks.data_corpus import write_corpus

RUNS, PARENT = Path("runs/conversion"), Path("runs/smollm2/parent")
RECIPES = Path("jobs/recipes/smollm2/arms")
TEXT, TEXT_BYTES = Path("build/text-24MB"), 24_000_000
STEPS = 128
STARTS = {
    "aligned": {"logits": "aligned"},
    "shifted": {"logits": "shifted", "first-place": "clean"},
}
_GROWING = {
    "trainer": {"block_sizes": [{"block_size": 2, "share": 0.25}, {"block_size": 4, "share": 0.75}]}
}
_AR = {"ar_weight": 0.3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to convert: a job, its start, and its settings beside the shared recipe."""

    start: str
    """A start of `STARTS`, an arm before this one, or the parent."""
    job: str = "pretrain"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS

    def folder(self, name: str) -> Path:
        """Its run folder."""
        return RUNS / name.replace(" ", "_")


def arms_of(better: str) -> dict[str, Arm]:
    """The arms in the order of their running; the later ones vary the better of the two axes."""
    before = STEPS * 3 // 4
    return {
        "AR control": Arm(start="parent"),
        "aligned": Arm(start="aligned", settings=_GROWING | _AR),
        "shifted": Arm(start="shifted", settings=_GROWING | _AR),
        "CE only": Arm(start=better, settings=_GROWING),
        "teacher": Arm(
            start=better, job="distil", settings=_GROWING | _AR | {"teacher": str(PARENT)}
        ),
        # The few-step stage takes the last quarter of the tokens of an arm without its decay.
        "before few-step": Arm(
            start=better, settings=_GROWING | _AR | {"optimizer": {"decay_rate": 0.0}}, steps=before
        ),
        "few-step": Arm(
            start="before few-step",
            settings=_AR | {"entropy_weight": 1.0, "entropy_temperature": 0.5},
            steps=STEPS - before,
        ),
    }


def cascade(*words: str | Path) -> None:
    """Run a command of the product; its failure ends this one."""
    command = [sys.executable, "-m", "jobs.cascade", *map(str, words)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def make_starts() -> None:
    """The text, the corpus and the converted starts."""
    write_corpus(TEXT, TEXT_BYTES)
    if not (RUNS / "corpus/manifest.json").is_file():
        cascade("prepare", "--config", RECIPES / "prepare.yaml")
    for name, axes in STARTS.items():
        if not (RUNS / "starts" / name / "manifest.json").is_file():
            flags = [f"--{key}={value}" for key, value in axes.items()]
            flags += ["--block-size=4", "--clean-half=token_causal"]
            cascade("convert", "--source", PARENT, "--output", RUNS / "starts" / name, *flags)


def model_of(arms: dict[str, Arm], start: str) -> Path:
    """The folder of the model that an arm starts from."""
    if start == "parent":
        return PARENT
    return RUNS / "starts" / start if start in STARTS else arms[start].folder(start) / "model"


def train(arms: dict[str, Arm], name: str) -> None:
    """Run one arm to its end, from wherever it was; its whole recipe stays beside its folder."""
    arm = arms[name]
    start = str(model_of(arms, arm.start))
    settings: dict[str, Any] = yaml.safe_load((RECIPES / "train.yaml").read_text())
    own = {"output": str(arm.folder(name)), "initial_model": start, **arm.settings}
    for key, value in own.items():
        nested = isinstance(value, Mapping)
        settings[key] = {**settings[key], **value} if nested else value
    settings["trainer"]["num_steps"] = arm.steps
    recipe = arm.folder(name).with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    cascade(arm.job, "--config", recipe)


def main() -> int:
    """All arms, then their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--better", default="shifted", choices=sorted(STARTS))
    parser.add_argument("--only", nargs="*", help="arms to run; all of them without it")
    options = parser.parse_args()
    arms = arms_of(options.better)
    make_starts()
    for name in options.only or arms:
        train(arms, name)
    finished = {
        name: arm.folder(name)
        for name, arm in arms.items()
        if (arm.folder(name) / "summary.json").is_file()
    }
    stages = {*finished} - {*STARTS}  # a start and the arm from it bear one name
    after = {name: arms[name].start for name in finished if arms[name].start in stages}
    return report(finished, after, PARENT, RUNS / "corpus", better=options.better)


if __name__ == "__main__":
    raise SystemExit(main())
