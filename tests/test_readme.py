"""The README tells the truth: its commands parse, its tree is the tree, its targets exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cascade_model.config import ModelConfig
from cascade_model.phases import require_phases
from jobs.cli import parse
from jobs.pretrain import PretrainConfig
from tests.tiny_models import saved_text_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "prepare": "PrepareConfig", "pretrain": "PretrainConfig", "convert": "ConvertConfig",
    "distil": "DistilConfig", "evaluate": "EvaluateConfig", "generate": "GenerateConfig",
    "serve": "ServeConfig", "demo": "DemoConfig", "export": "ExportConfig",
    "sft": "SftConfig", "teach": "TeachConfig", "plan": {"pretrain": "pretrain"},
    "shards": {"verify": "VerifyConfig"}, "tokenizer": {"train": "TrainConfig"},
    "validate": "ValidateConfig",
}  # fmt: skip


def bash_lines() -> list[str]:
    """Every command of the README's bash blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def stage_commands() -> list[list[str]]:
    """[stage, flag, ...] of each `cascade STAGE` and `python -m jobs.STAGE` in the README."""
    found = []
    for line in bash_lines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word == "cascade" and place + 1 < len(words):
                found.append(words[place + 1 :])
            if word == "-m" and words[place + 1].startswith("jobs."):
                found.append([words[place + 1].removeprefix("jobs."), *words[place + 2 :]])
    return found


def test_the_readme_shows_every_stage():
    assert {words[0] for words in stage_commands()} >= set(CONFIGS) - {"demo"}


@pytest.mark.parametrize("words", stage_commands(), ids=lambda words: words[0])
def test_a_stage_command_of_the_readme_parses(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    [block] = re.findall(r"```yaml\n(# mix.yaml.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mix.yaml").write_text(block)
    stage, *flags = [word.replace("mix.yaml", str(tmp_path / "mix.yaml")) for word in words]
    name = CONFIGS[stage]
    name = name[flags.pop(0)] if isinstance(name, dict) else name
    module = importlib.import_module(f"jobs.{stage}")
    config_class = module.config_of(name) if stage == "plan" else getattr(module, name)
    assert isinstance(parse(config_class, flags), config_class)


def test_the_schedule_of_block_sizes_in_the_jobs_readme_parses(tmp_path):
    text = (ROOT / "jobs/README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(# grow.yaml.*?)```", text, flags=re.DOTALL)
    (tmp_path / "grow.yaml").write_text(block)
    words = ["--config", str(tmp_path / "grow.yaml"), "--corpus", "c", "--output", "o"]
    config = parse(PretrainConfig, words)
    shape = ModelConfig(
        vocab_size=9, mask_id=1, pad_id=2, eos_id=3, block_size=config.model.block_size or 0
    )
    require_phases(config.trainer, shape, corpus_block_size=8, length=64)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    saved_text_model(tmp_path / "run/model")
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "passes=" in capsys.readouterr().out


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {shlex.split(line, comments=True)[1] for line in bash_lines() if line.startswith("make")}
    assert {"demo", "test"} <= used <= targets


def test_the_tree_of_the_readme_is_the_tree():
    tree = README.split("## The tree", 1)[1].split("```")[1]
    folders = re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE)
    assert folders == ["cascade_model", "pipelines", "jobs", "cluster", "tests"]
    assert all((ROOT / folder / "README.md").is_file() for folder in folders)


def test_no_table_is_left_to_be_filled():
    """Numbers are measured, never left as a name in capitals."""
    for path in (ROOT / "README.md", ROOT / "tests/benchmarks/README.md"):
        assert not re.findall(r"\b[A-Z]+_TABLE\b", path.read_text(encoding="utf-8")), path


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs/recipes").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_parses(path, monkeypatch):
    """A recipe is named after its stage, or after what `pretrain` makes of it."""
    monkeypatch.chdir(ROOT)
    stage = path.stem if path.stem in CONFIGS else "pretrain"
    required = {"evaluate": ["--model", "m", "--corpus", "c"], "prepare": [],
                "generate": ["--model", "m", "--input", "i", "--output", "o"],
                "serve": ["--model", "m"], "demo": [],
                "distil": ["--corpus", "c", "--output", "o", "--teacher", "t",
                           "--initial-model", "s"],
                "sft": ["--corpus", "c", "--output", "o", "--initial-model", "m"],
                "pretrain": ["--corpus", "c", "--output", "o"]}  # fmt: skip
    config_class = getattr(importlib.import_module(f"jobs.{stage}"), CONFIGS[stage])
    parse(config_class, ["--config", str(path), *required[stage]])
