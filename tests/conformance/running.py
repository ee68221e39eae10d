"""Every case of every system: which runner it takes, and what becomes of a folder."""

import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from cascade_model.errors import InputError
from tests.conformance import forward, losses, samplers
from tests.conformance.cases import Case, CaseError, read_cases, system_folders
from tests.conformance.checkpoints import (
    HOW_TO_GET_SMOLLM2,
    SMOLLM2,
    Checkpoints,
    smollm2_file,
)
from tests.conformance.verdicts import Verdict

_UNREADABLE = (OSError, ValueError, LookupError, AttributeError, TypeError)
Runner = Callable[[Case, Checkpoints], Verdict]
RUNNERS: dict[str, Runner] = {
    "logits": forward.logits,
    "logits_block_causal": forward.logits_block_causal,
    "logits_bd3_train": forward.logits_bd3_train,
    "block_diff_mask": forward.block_diff_mask,
    "likelihood": losses.likelihood,
    "pretrain_loss": losses.pretrain_loss,
    "sft_loss": losses.sft_loss,
    "bd3_loss": losses.bd3_loss,
    "mdlm_loss": losses.mdlm_loss,
    "sample": samplers.sample,
    "infill": samplers.infill,
    "greedy": samplers.greedy,
    "top_logits": samplers.top_logits,
}
SUPPORTED = (
    "a2d_llama",
    "a2d_qwen2",
    "a2d_qwen3",
    "ar",
    "bd3lm_dit",
    "dream",
    "fast_dllm",
    "fast_dllm_dream",
    "fast_dllm_v2",
    "llada",
    "llada2",
    "llada21",
    "llada_likelihood",
    "llada_moe",
    "mdlm_dit",
    "sdar",
    SMOLLM2,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One case and its verdict."""

    case: Case
    verdict: Verdict


@dataclass(kw_only=True, slots=True)
class Report:
    """What became of all folders."""

    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Systems left out by name."""
    complaints: list[str] = field(default_factory=list)
    """What kept cases from being run; any of them makes the run fail."""

    @property
    def failures(self) -> list[Outcome]:
        """The cases that did not pass."""
        return [outcome for outcome in self.outcomes if outcome.verdict.problem]

    @property
    def has_passed(self) -> bool:
        """Whether everything that should run did, and passed."""
        return bool(self.outcomes) and not self.failures and not self.complaints


def run_all(root: Path, only: Collection[str] = (), skip: Collection[str] = ()) -> Report:
    """Every system below the root, or `only` some, but none to `skip`."""
    report, checkpoints = Report(), Checkpoints(root)
    folders = {folder.name: folder for folder in system_folders(root)}
    for name in sorted(set(only) - set(folders)):
        report.complaints.append(f"{name}: --only names it, and {root} has no such folder")
    for name, folder in folders.items():
        if name in skip:
            report.skipped.append(name)
        elif not only or name in only:
            complaint = why_not(folder)
            if complaint:
                report.complaints.append(f"{name}: {complaint}")
            else:
                report.outcomes += run_system(folder, checkpoints)
    if not report.outcomes and not report.complaints:
        report.complaints.append(f"{root}: no case was run; give a folder of system folders")
    return report


def why_not(folder: Path) -> str:
    """Why a system cannot be run; empty where it can."""
    if folder.name not in SUPPORTED:
        return f"this system is not supported; --skip {folder.name} leaves it out"
    try:
        cases = read_cases(folder)
    except (*_UNREADABLE, SafetensorError) as error:
        return f"its cases cannot be read ({type(error).__name__}: {error})"
    if not cases:
        return "the folder holds no case"
    if folder.name == SMOLLM2 and smollm2_file() is None:
        return f"skipped, absent: {HOW_TO_GET_SMOLLM2}; --skip {SMOLLM2} leaves it out"
    return ""


def run_system(folder: Path, checkpoints: Checkpoints) -> list[Outcome]:
    """Every case of one system."""
    return [Outcome(case=case, verdict=run_case(case, checkpoints)) for case in read_cases(folder)]


def run_case(case: Case, checkpoints: Checkpoints) -> Verdict:
    """One case; an input that nobody looked at fails it, and so does whatever is raised."""
    runner = RUNNERS.get(case.kind)
    if runner is None:
        return Verdict(f"kind={case.kind} is not known")
    try:
        verdict = runner(case, checkpoints)
    except (CaseError, InputError) as error:
        return Verdict(str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Verdict(f"{type(error).__name__} at {where}: {error}")
    return Verdict(case.unknown(), verdict.logit_error) if case.unknown() else verdict
