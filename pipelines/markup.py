"""HTML elements from Python values: every text is escaped unless it is `Html` already.

Documents hold anything, other people's HTML included, and a report shows pieces of them. So no page
is put together from strings: whatever is not made here is text, and stays text in the browser.
"""

import re
from html import escape

_VOID = ("meta",)
# Characters that draw nothing or turn the text around: controls but tab and newline, bidirectional
# marks and overrides, zero-width ones.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: object) -> Html:
    """One element; children that are no `Html` are escaped, None is left out.

    `class_` is `class`, `data_x` is `data-x`; an attribute that is None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inside}</{name}>")


def join(*children: str | None) -> Html:
    """Several pieces one after the other; what is no `Html` is escaped."""
    whole = (each for each in children if each is not None)
    return Html("".join(each if isinstance(each, Html) else escape(each) for each in whole))


def visible(text: str) -> str:
    """A text whose unseen characters are spelt out, such as ⟨U+202E⟩: all of it is shown."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", text)
