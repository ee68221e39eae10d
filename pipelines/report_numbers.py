"""A number of the report on its page: text for people, its exact value, and where it stands.

The place is a JSON pointer (RFC 6901) into report.json, so that a page can be checked by machine.
"""

from collections.abc import Callable
from typing import Any

from pipelines.markup import Html, element


def number(report: dict[str, Any], pointer: str, show: Callable[[Any], str] | None = None) -> Html:
    """A number of the report as text, with its exact value and place."""
    value = at(report, pointer)
    text = (show or plain)(value)
    return element("data", text, value=repr(value), data_pointer=pointer)


def at(report: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901)."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        report = report[int(name)] if isinstance(report, list) else report[name]
    return report


def escaped(name: str) -> str:
    """A name as one step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def plain(value: float) -> str:
    """1,234 or 1.23."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def rate(value: float) -> str:
    """A share as 12.34 %."""
    return f"{100 * value:.2f} %"


def rounded(value: float) -> str:
    """1,234 of 1234.4."""
    return f"{value:,.0f}"
