"""The mistakes of a user, as one sentence each.

Whatever is raised from here is shown by the command line without a traceback: the sentence names
the setting, its value and the cure. Everything else that is raised is a fault of ours.
"""


class InputError(Exception):
    """A setting or an input that cannot work; the message names setting, value and cure."""

    exit_code = 2


class CorpusMismatch(InputError):
    """A corpus that is damaged, unfinished or made for something else; both values are named."""

    exit_code = 3


class CheckpointMismatch(InputError):
    """A checkpoint that is damaged, unfinished or made for something else; both are named."""

    exit_code = 3
