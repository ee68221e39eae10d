"""A picture of the page in mid-denoising, made by a real model in a real browser.

python -m tests.jobs.page_picture --model runs/smollm2/long/model --output jobs/page/page.png
"""

import argparse
import time
from pathlib import Path

import torch

from cascade_model.llm import LLM
from tests.jobs import browser as browsers
from tests.jobs.test_page import Opened, paced, served

PROMPT = 'def read_file(path):\n    """Read a file'
MOST_BYTES = 200_000
# In a block that is half done, with enough text above it to see what the colours tell.
MOMENT = """(() => {
  const cells = [...document.querySelectorAll('.cell')];
  const masks = cells.filter((cell) => cell.classList.contains('mask')).length;
  return cells.length > 80 && masks > 0 && masks < 3 && document.querySelector('.fresh') !== null;
})()"""


def main() -> None:
    """Write the picture; raises `SystemExit` where it is too large for a repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", default="2")
    parser.add_argument("--scheme", default="light")
    chosen = parser.parse_args()
    browser = browsers.executable()
    if browser is None:
        raise SystemExit("there is no browser; run `make setup`")
    torch.set_num_threads(1)
    with (
        LLM.load(chosen.model) as llm,
        served(llm, model_name="SmolLM2-135M", decode=paced(llm, 0.02)) as url,
        browsers.started(browser) as running,
    ):
        screen = {"width": 1200, "height": 860}
        context = running.new_context(
            viewport=screen, reduced_motion="reduce", color_scheme=chosen.scheme
        )
        page = Opened(context.new_page(), url)
        page.page.wait_for_selector("#run:enabled")
        page.set(
            prompt=PROMPT, seed=chosen.seed, max_tokens="110", confidence_threshold="0.35",
            temperature="0.5",
        )  # fmt: skip
        page.page.click("#run")
        page.until(MOMENT, seconds=600)
        picture = page.page.screenshot()
        page.page.click("#stop")
        time.sleep(0.2)
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"the picture has {len(picture)} bytes, over {MOST_BYTES}")
    chosen.output.write_bytes(picture)


if __name__ == "__main__":
    main()
