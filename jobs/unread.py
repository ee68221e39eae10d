"""What was looked at in a right document, and what no check can look at, in the same words for
every kind."""

from collections.abc import Iterable
from typing import Any

from jobs.serve import is_ours


def every_setting(unread: Iterable[str], within: str = "") -> str:
    """Words for all settings, those in the text `within` too, but not for what is named."""
    too = f", those in {within} too" if within else ""
    left_out = " and ".join(dict.fromkeys(unread))
    return f"every setting{too}{', but not ' if left_out else ''}{left_out}"


def foreign_args(serve_config: dict[str, Any]) -> list[str]:
    """The args of applications of others in a right Serve config: free settings, for Serve."""
    applications = serve_config["applications"]
    return [
        f"the args of {each['import_path']}"
        for each in applications
        if not is_ours(each) and each.get("args")
    ]
