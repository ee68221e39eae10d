"""The end of a command by a signal, at whatever stage it comes: one sentence, one exit code.

Light to import, as it is the first that a command does.
"""

import functools
import sys
from collections.abc import Callable, Sequence

from cascade_model.errors import Stopped
from cascade_model.stopping import command_is_running, sigterm_interrupts

INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C has ended."""

Main = Callable[[Sequence[str] | None], int]


def ended_by_signals(main: Main) -> Callable[..., int]:
    """The `main` of a command, which SIGTERM and Ctrl-C may end anywhere.

    SIGTERM gives the exit code of `Stopped`, as it does to a stage with an orderly stop of its own.
    Of commands inside of each other the outermost one sees to it.
    """

    @functools.wraps(main)
    def ended(argv: Sequence[str] | None = None) -> int:
        if command_is_running():
            return main(argv)
        is_program = argv is None
        with sigterm_interrupts(is_program=is_program) as sigterm:
            try:
                sigterm.let_in()
                code = main(argv)
                sigterm.hold_off()
            except KeyboardInterrupt:
                sigterm.hold_off()
                is_stop = sigterm.has_come
                print(
                    f"{'stopped by SIGTERM' if is_stop else 'interrupted'}; what was committed "
                    "stays, run the same command to go on",
                    file=sys.stderr,
                )
                code = Stopped.exit_code if is_stop else INTERRUPTED
        if is_program and "ray" in sys.modules:
            from pipelines.ray_signals import ignored_to_the_end

            ignored_to_the_end()
        return code

    return ended
