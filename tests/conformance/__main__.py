"""`python -m tests.conformance DIR`: 0 when every case passed, 1 when not, 2 for a wrong call."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.running import run_all
from tests.conformance.table import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds one folder a system")
    for name, meaning in (("only", "run these systems alone"), ("skip", "leave these out")):
        parser.add_argument(
            f"--{name}",
            metavar="F",
            action="append",
            default=[],
            help=f"{meaning}: names of folders, with commas or again",
        )
    chosen = parser.parse_args(arguments)
    if not chosen.folder.is_dir():
        parser.error(f"DIR={chosen.folder} is no folder; give one of the conformance layout")
    report = run_all(chosen.folder, _names(chosen.only), _names(chosen.skip))
    print(render(report))
    return 0 if report.has_passed else 1


def _names(values: Sequence[str]) -> set[str]:
    return {name.strip().rstrip("/") for value in values for name in value.split(",")} - {""}


if __name__ == "__main__":
    sys.exit(main())
