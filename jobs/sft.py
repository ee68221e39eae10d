"""Teach a model to answer: training with what suits conversations, on responses only.

In a corpus of conversations only what the assistant says can be masked: a prompt is always visible,
carries no loss and is not counted. An answer ends with the end of text, which is masked and learnt
as its tokens are, so that a model learns to stop. Conversations packed into one sequence do not see
each other, and each counts once, however long its answers are (`normaliser=document`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade_model.config import Normaliser
from cascade_model.settings import check
from jobs import pretrain
from jobs.cli import command
from jobs.objectives import check_auxiliary
from jobs.pretrain import loss_of, objective
from jobs.training import start

__all__ = ["SftConfig", "check_settings", "loss_of", "main", "objective", "run"]

if TYPE_CHECKING:
    from cascade_model.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig(pretrain.PretrainConfig):
    """Go on from a model on conversations: prompts stay visible, only responses are learnt."""

    normaliser: Normaliser = "document"
    """What the weighted sum is divided by: each conversation by its own response tokens and then
    the mean over conversations, or as in `cascade pretrain`."""
    allow_text: bool = False
    """Take a corpus without any prompt, whose every token is learnt."""
    allow_cut: bool = False
    """Take a corpus whose conversations were cut at the end of a sequence (packing=concat), so that
    the rest of an answer does not see its prompt."""

    def __post_init__(self) -> None:
        pretrain.PretrainConfig.__post_init__(self)
        check(
            self.initial_model is not None,
            "initial_model is missing, and answers are learnt after the language; name the model "
            "folder to go on from",
        )


def run(config: SftConfig) -> dict[str, Any]:
    """Check the settings, train, and return the run's summary."""
    check_settings(config)
    return start(config, pretrain.train, objective(config))


def check_settings(config: SftConfig) -> None:
    """Refuse what this stage alone knows of, before any worker starts."""
    from cascade_model.corpus import Corpus

    check_conversations(config, Corpus.open(config.corpus).manifest)
    check_auxiliary(config)


def check_conversations(config: SftConfig, manifest: "Manifest") -> None:
    """Refuse a corpus that has nothing to answer, or answers without their prompts."""
    check(
        config.allow_text or prompt_tokens(manifest) > 0,
        f"corpus={config.corpus} has no prompts, every token of it is learnt; prepare "
        "conversations (source.messages_column), or set allow_text=True",
    )
    check(
        config.allow_cut or manifest.prepare.get("packing") != "concat",
        f"corpus={config.corpus} was made with packing=concat, which parts answers from their "
        "prompts; prepare it with packing=best_fit, or set allow_cut=True",
    )


def prompt_tokens(manifest: "Manifest") -> int:
    """Tokens that are shown and not learnt: all places but padding and what can be masked."""
    counts = manifest.counts
    places = counts["sequences"] * manifest.sequence_length
    learnt = sum(split.num_tokens for split in manifest.splits.values())
    return places - counts["padding"] - learnt


main = command(SftConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
