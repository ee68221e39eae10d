"""Precedence, refusals and the round trip of the configuration scheme."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml

from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError
from cascade_model.training_config import Phase
from jobs.cli import build, command, dump, parse
from jobs.pretrain import PretrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """A job for these tests."""

    output: str
    """Where to."""
    num_steps: int = 3
    rate: float = 0.5
    paths: tuple[str, ...] = ()
    name: str | None = None
    quick: bool = False
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    recipes: dict[str, NoiseConfig] = field(default_factory=dict)


def write(folder, text, name="a.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_then_files_in_order_then_flags(tmp_path):
    first = write(tmp_path, "output: a\nnum_steps: 5\nrate: 0.25\nnoise: {seed: 4}\n")
    second = write(tmp_path, "num_steps: 6\nquick: true\npaths: [x, y]\n", "b.yaml")
    config = parse(ToyConfig, ["--config", first, f"--config={second}", "--noise.block-size", "16"])
    assert config == ToyConfig(
        output="a", num_steps=6, rate=0.25, quick=True, paths=("x", "y"),
        noise=NoiseConfig(seed=4, block_size=16),
    )  # fmt: skip


def test_a_value_of_a_file_is_never_read_as_a_flag(tmp_path):
    text = 'output: "-x"\nname: --help\npaths: ["--config", "-"]\nnum_steps: -1\nrate: -2\n'
    config = parse(ToyConfig, ["--config", write(tmp_path, text)])
    assert (config.output, config.name, config.paths) == ("-x", "--help", ("--config", "-"))
    assert (config.num_steps, config.rate) == (-1, -2.0)
    assert isinstance(config.rate, float)


def test_files_are_laid_over_each_other_setting_by_setting(tmp_path):
    first = write(tmp_path, "output: a\nnoise: {seed: 4, block_size: 2}\npaths: [x]\n")
    second = write(tmp_path, "noise: {block_size: 16}\npaths: []\n", "b.yaml")
    config = parse(ToyConfig, ["--config", first, "--config", second])
    assert config.noise == NoiseConfig(seed=4, block_size=16)
    assert config.paths == ()


def test_a_dataclass_checks_itself_once_with_flags_and_files_together(tmp_path):
    """3 alone is no block size; the flag corrects the file before anything is judged."""
    file = write(tmp_path, "output: a\nnoise: {block_size: 3}\n")
    with pytest.raises(InputError, match=r"noise.block_size=3"):
        parse(ToyConfig, ["--config", file])
    config = parse(ToyConfig, ["--config", file, "--noise.block-size", "8"])
    assert config.noise.block_size == 8


def test_defaults_of_a_group_that_its_owner_chose_stay(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Owner:
        noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(block_size=2, seed=9))

    file = write(tmp_path, "noise: {seed: 1}")
    assert parse(Owner, []).noise == NoiseConfig(block_size=2, seed=9)
    assert parse(Owner, ["--config", file]).noise == NoiseConfig(block_size=2, seed=1)
    assert build(Owner, {"noise": {"seed": 1}}, "args") == parse(Owner, ["--config", file])


def test_groups_by_name_come_from_files_and_can_be_corrected_by_flags(tmp_path):
    first = write(tmp_path, "output: a\nrecipes: {x: {seed: 4, block_size: 3}, y: {}}\n")
    second = write(tmp_path, "recipes: {x: {seed: 5}}\n", "b.yaml")
    flags = ["--config", first, "--config", second, "--recipes.x.block-size", "8"]
    config = parse(ToyConfig, flags)
    assert config.recipes == {"x": NoiseConfig(seed=5, block_size=8), "y": NoiseConfig()}
    assert list(config.recipes) == ["x", "y"]
    assert parse(ToyConfig, ["--config", write(tmp_path, dump(config), "c.yaml")]) == config
    with pytest.raises(InputError, match=r"noise.block_size=3"):
        parse(ToyConfig, ["--config", first])
    built = build(ToyConfig, {"output": "a", "recipes": {"y": {"seed": 1}}}, "args")
    assert built.recipes == {"y": NoiseConfig(seed=1)}


def test_help_shows_the_defaults_of_the_files(tmp_path, capsys):
    file = write(tmp_path, "num_steps: 4711\n")
    with pytest.raises(SystemExit):
        parse(ToyConfig, ["--config", file, "--help"])
    assert "4711" in capsys.readouterr().out


def test_the_resolved_config_parses_back_to_an_equal_object(tmp_path):
    config = ToyConfig(output="o", paths=("p",), name=None, noise=NoiseConfig(min_rate=0.25))
    file = write(tmp_path, dump(config))
    assert parse(ToyConfig, ["--config", file]) == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("outptu: a", "no setting `outptu`; did you mean `output`"),
        ("output: a\nnoise: {sede: 1}", "no setting `noise.sede`; did you mean `noise.seed`"),
        ("output: a\nnum_steps: many", "`num_steps` is 'many'; it must be a whole number"),
        ("output: a\nrate: [1]", "`rate` is .*must be a number"),
        ("output: a\nnoise: 3", "`noise` is a group of settings"),
        ("output: a\nnoise: {per: word}", "one of block, sequence"),
        ("output: a\nrecipes: [a]", "`recipes` is .* groups of settings, each below its name"),
        ("output: a\nrecipes: {x: 3}", "`recipes` is .* groups of settings, each below its name"),
        ("output: a\nrecipes: {x: {sede: 1}}", "`recipes.x.sede`; did you mean `recipes.x.seed`"),
        ("output: a\nrecipes: {x.y: {seed: 1}}", "`recipes` has the name 'x.y'"),
        ("- a", "holds no mapping"),
        ("output: [", "not valid YAML"),
        ("output: a\nrate: 1\noutput: b", "`output` stands at line 1 and again at line 3; keep"),
        ("noise:\n  seed: 1\n  seed: 2", "`noise.seed` stands at line 2 and again at line 3"),
        ("recipes: [{seed: 1, seed: 1}]", r"`recipes\[0\].seed` stands at line 1 and again"),
        ("output: &a [*a]\noutput: b", "`output` stands at line 1 and again at line 2"),
    ],
)
def test_a_wrong_file_is_refused_with_file_and_setting(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        parse(ToyConfig, ["--config", write(tmp_path, text)])
    assert "a.yaml" in str(caught.value)


def test_a_users_mistake_ends_in_a_box_and_code_2(tmp_path, capsys):
    main = command(ToyConfig, lambda config: None)
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert main(["--output", "x", "--noise.block-size", "3"]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "cannot be read" in shown
    assert "noise.block_size=3" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("argv", [[], ["--output", "x", "--rate", "much"], ["--outptu", "x"]])
def test_wrong_flags_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        command(ToyConfig, lambda config: None)(argv)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_mapping_builds_the_same_config_and_names_what_is_missing():
    assert build(ToyConfig, {"output": "a", "noise": {"seed": 3}}, "args") == ToyConfig(
        output="a", noise=NoiseConfig(seed=3)
    )
    with pytest.raises(InputError, match="args: the setting `output` is missing"):
        build(ToyConfig, {}, "args")


def test_a_list_of_groups_is_read_checked_and_written_again(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Listed:
        phases: tuple[Phase, ...] = ()

    file = tmp_path / "phases.yaml"
    file.write_text("phases:\n- {block_size: 1, share: 0.5}\n- {block_size: 4, share: 0.5}\n")
    wanted = (Phase(block_size=1, share=0.5), Phase(block_size=4, share=0.5))
    found = parse(Listed, ["--config", str(file)])
    assert found.phases == wanted
    assert build(Listed, yaml.safe_load(file.read_text()), "args").phases == wanted
    file.write_text(dump(found))
    assert parse(Listed, ["--config", str(file)]) == found
    assert parse(Listed, []).phases == ()
    for text, sentence in (
        ("phases: 3", "`phases` is 3; it must be a list of groups"),
        ("phases: [{block_size: 1}]", r"`phases\[0\].share` is missing"),
        ("phases: [{size: 1, share: 1.0}]", r"no setting `phases\[0\].size`"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=sentence):
            parse(Listed, ["--config", str(file)])


def test_a_list_of_groups_has_no_flag_and_says_where_it_is_set(capsys):
    corpus = ["--corpus", "c", "--output", "o", "--num-workers", "0"]
    for flag in ("--trainer.block-sizes", "--trainer.block_sizes=1"):
        with pytest.raises(InputError, match=r"`trainer\.block_sizes` is a list of groups"):
            parse(PretrainConfig, [*corpus, flag, "4"])
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--help"])
    assert "trainer.block_sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage", ["prepare", "pretrain", "convert", "distil", "evaluate", "generate", "serve", "demo"]
)
def test_help_takes_under_a_second_and_loads_nothing_heavy(stage):
    """Processor time, so that a busy machine does not judge."""
    program = (
        f"import resource, sys, jobs.{stage} as job\n"
        "try:\n    job.main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules), 'help loads too much'\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert used.ru_utime + used.ru_stime < 1, used\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


def test_what_a_stores_client_raises_is_one_sentence_and_other_faults_are_not(capsys, tmp_path):
    botocore = pytest.importorskip("botocore.exceptions")

    def fail_with(error):
        def run(config):
            raise error

        return command(ToyConfig, run)

    assert fail_with(botocore.NoCredentialsError())(["--output", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "NoCredentialsError: Unable to locate credentials" in told
    assert "Traceback" not in told
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError())(["--output", str(tmp_path)])
