"""The mistakes of a user, as one sentence each.

Whatever is raised from here is shown by the command line without a traceback: the sentence names
the setting, its value and the cure. Everything else that is raised is a fault of ours.
"""

from typing import TypeVar

Kind = TypeVar("Kind", bound="InputError")


class InputError(Exception):
    """A setting or an input that cannot work; the message names setting, value and cure."""

    exit_code = 2
    is_shared = False
    """Whether every rank of a run raises the same, so that one of them tells it for all."""

    def to_data(self) -> dict[str, str]:
        """As JSON-able data: a task sends it back, where an exception would arrive wrapped."""
        return {"kind": type(self).__name__, "message": str(self)}

    @staticmethod
    def from_data(data: dict[str, str]) -> "InputError":
        """The error that `to_data` told of, in its own class."""
        kinds = {kind.__name__: kind for kind in _family(InputError)}
        return kinds.get(data["kind"], InputError)(data["message"])


class DoesNotFit(InputError):
    """A request whose keys and values the engine's `cache_bytes` can never hold."""


class Unfinished(InputError):
    """An input that stops a job which can go on from what it has made; so that is kept."""


class Stopped(Unfinished):
    """A run that was asked to stop and saved at a step boundary; nothing is lost.

    The exit code is that of a passing failure (EX_TEMPFAIL of sysexits.h): try again later.
    """

    exit_code = 75
    is_shared = True

    @classmethod
    def at(cls, step: int, reason: str) -> "Stopped":
        """The one sentence of such an end."""
        return cls(
            f"stopped at step {step} ({reason}); run the same command again, which goes on from "
            "there"
        )


def shared(error: Kind) -> Kind:
    """The error as one that every rank raises alike."""
    error.is_shared = True
    return error


class Unavailable(Unfinished):
    """A service that does not answer now; what was made stays, and the job can go on later."""

    exit_code = 75


def of_store(error: Exception) -> Unfinished | None:
    """What a store's client raised, as a sentence; none for any other error.

    The clients have errors of their own where no credentials are found or no server answers.
    """
    if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
        return None
    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    return Unfinished(
        f"the store cannot be used ({type(error).__name__}: {reason}); check credentials, endpoint "
        "and network, then run the same command again"
    )


class CorpusMismatch(InputError):
    """A corpus that is damaged, unfinished or made for something else; both values are named."""

    exit_code = 3


class CheckpointMismatch(InputError):
    """A checkpoint that is damaged, unfinished or made for something else; both are named."""

    exit_code = 3


def _family(kind: type[InputError]) -> list[type[InputError]]:
    """A class and everything derived from it."""
    return [kind, *(each for child in kind.__subclasses__() for each in _family(child))]
