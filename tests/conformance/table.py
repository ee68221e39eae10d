"""The report as text: a table of systems and kinds, then what failed and what was not run."""

from collections.abc import Iterable

from tests.conformance.running import Outcome, Report

_HEADS = ("system", "kind", "passed", "failed", "largest logit error")


def render(report: Report) -> str:
    """Table, failures, skipped systems and complaints."""
    rows = [_HEADS, *_rows(report.outcomes), _total(report.outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "|".join(["", *("-" * (width + 2) for width in widths), ""]))
    lines += [f"FAILED {o.case.system}/{o.case.name}: {o.verdict.problem}" for o in report.failures]
    lines += [f"SKIPPED {name}: by name" for name in report.skipped]
    lines += [f"NOT RUN {complaint}" for complaint in report.complaints]
    return "\n".join(lines)


def _rows(outcomes: list[Outcome]) -> Iterable[tuple[str, ...]]:
    groups = dict.fromkeys((outcome.case.system, outcome.case.kind) for outcome in outcomes)
    for system, kind in sorted(groups):
        mine = [o for o in outcomes if (o.case.system, o.case.kind) == (system, kind)]
        yield (system, kind, *_counts(mine))


def _total(outcomes: list[Outcome]) -> tuple[str, ...]:
    return ("all", "", *_counts(outcomes))


def _counts(outcomes: list[Outcome]) -> tuple[str, str, str]:
    failed = sum(bool(outcome.verdict.problem) for outcome in outcomes)
    errors = [o.verdict.logit_error for o in outcomes if o.verdict.logit_error is not None]
    worst = f"{max(errors):.1e}" if errors else ""
    return str(len(outcomes) - failed), str(failed), worst


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    words = [cells[0].ljust(widths[0]), cells[1].ljust(widths[1])]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return f"| {' | '.join(words + numbers)} |"
