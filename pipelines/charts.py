"""Charts as inline SVG: no script, no outside file, colours from the page's own style.

Each mark carries its number (`data-value`), the place of that number in the report
(`data-pointer`, RFC 6901) and a sentence that the browser shows on hover, so that a chart can be
read and checked exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.markup import Html, element

_WIDTH, _HEIGHT, _FOOT = 640, 160, 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One bar of a histogram, or one part of a whole."""

    label: str
    """Below the bar, or in the legend."""
    count: int
    says: str
    """Shown on hover."""
    pointer: str
    """JSON pointer of `count` in report.json."""
    kind: str = "plain"
    """Style class: plain, out, dropped or dead."""


def histogram(marks: Sequence[Mark], title: str, width: int = _WIDTH) -> Html:
    """Bars side by side, heights in proportion to the counts; every n-th label is drawn.

    `width` is in letters' units: a chart that is shown narrow has fewer of them.
    """
    most = max((mark.count for mark in marks), default=0) or 1
    step = width / max(1, len(marks))
    every = -(-len(marks) * 40 // width)
    drawn = [_bar(mark, place * step, step, most) for place, mark in enumerate(marks)]
    labels = [
        _label(mark.label, (place + 0.5) * step)
        for place, mark in enumerate(marks)
        if place % every == 0
    ]
    base = element("line", x1=0, x2=width, y1=_HEIGHT, y2=_HEIGHT, class_="base")
    return _svg(title, width, _HEIGHT + _FOOT, *drawn, base, *labels)


def _bar(mark: Mark, left: float, step: float, most: int) -> Html:
    # A count that is not zero is seen, however small it is beside the largest.
    height = max(_HEIGHT * mark.count / most, 1.0 if mark.count else 0.0)
    return _rect(mark, left + step * 0.06, _HEIGHT - height, step * 0.88, height)


def _label(text: str, middle: float) -> Html:
    return element("text", text, x=f"{middle:.1f}", y=_HEIGHT + 15, text_anchor="middle")


def whole(marks: Sequence[Mark], title: str) -> Html:
    """Parts of a whole as one bar; a part that is not zero is at least two units wide."""
    total = sum(mark.count for mark in marks) or 1
    widths = [max(_WIDTH * mark.count / total, 2.0 if mark.count else 0.0) for mark in marks]
    scale = _WIDTH / (sum(widths) or 1)
    drawn, left = [], 0.0
    for mark, width in zip(marks, widths, strict=True):
        drawn.append(_rect(mark, left, 0, width * scale, 26))
        left += width * scale
    return _svg(title, _WIDTH, 26, *drawn)


def _rect(mark: Mark, x: float, y: float, width: float, height: float) -> Html:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    return element(
        "rect",
        element("title", mark.says),
        class_=mark.kind,
        data_pointer=mark.pointer,
        data_value=mark.count,
        **{name: f"{value:.2f}" for name, value in sizes.items()},
    )


def _svg(title: str, width: int, height: int, *children: Html) -> Html:
    view = f"0 0 {width} {height}"
    return element("svg", *children, viewBox=view, role="img", aria_label=title)
