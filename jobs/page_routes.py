"""The page at `/`: try a prompt and watch blocks denoise. Three files, nothing from elsewhere.

They are open without a key, since a browser cannot send one before there is a page that asks. They
are the same for every server but for one word, whether to ask; whatever else the page shows comes
through the API with the key, which it keeps in memory only.
"""

from functools import partial
from importlib.resources import files

from fastapi import FastAPI, Response

PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path -> file in `jobs/page`, and what it is."""

# Own files alone, no inline code, no markup from text, no frame around it, no form sent by itself.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ASKS = b'data-key="needed"'


def add_page(api: FastAPI, *, asks_for_key: bool) -> None:
    """Add the page's routes; they are no part of the OpenAPI document."""
    for path, (name, kind) in PAGE_FILES.items():
        body = (files("jobs") / "page" / name).read_bytes()
        if name == "page.html" and not asks_for_key:
            body = body.replace(_ASKS, b'data-key="none"')
        own = partial(Response, body, media_type=f"{kind}; charset=utf-8", headers=HEADERS)
        api.add_api_route(path, _giving(own), include_in_schema=False, name=name)


def _giving(response: partial[Response]):
    async def give() -> Response:
        return response()

    return give
