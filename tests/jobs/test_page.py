"""The page in a real headless browser, over a real tiny model and real HTTP.

Every page that a test opens must end without a message in the console, without a violation of its
own policy and without a request to anybody else.
"""

import asyncio
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from cascade_model.llm import LLM
from cascade_model.sampling import Rule, SamplingParams
from cascade_model.watching import DenoisedStep
from jobs import routes
from jobs.choices import STEP
from jobs.gate import ApiKeys
from jobs.openai_protocol import ApiError
from jobs.openai_requests import CompletionRequest
from jobs.page_routes import HEADERS, PAGE_FILES
from jobs.routes import build_api
from tests.jobs.test_infilling import folder, trained  # noqa: F401  (a fixture)
from tests.jobs.tiny_endpoint import endpoint, require_error, tiny_llm

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='in'</script>"
RIGHT = "sk-3f9c-the-only-one"
FIELDS = {"rule": "confidence_threshold", "confidence_threshold": 0.9, "temperature": 0.7}


@pytest.fixture(scope="module")
def llm():
    with tiny_llm(max_sequence_length=256) as llm:
        yield llm


@contextlib.contextmanager
def served(llm: LLM, **changes) -> Iterator[str]:
    """The endpoint on a port of this machine; its URL."""
    settings = {"keys": None, **changes}
    config = uvicorn.Config(build_api(endpoint(llm, **settings)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def paced(llm: LLM, seconds: float):
    """A source of blocks that waits before every word."""

    async def decode(tokens, params, choice, watch=False):
        async for told in llm.stream_steps(tokens, params, choice, watch=watch):
            await asyncio.sleep(seconds)
            own = dataclasses.asdict(told)
            yield {STEP: own} if isinstance(told, DenoisedStep) else own

    return decode


class Opened:
    """A page, and what went wrong on it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.console: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation',"
            " (event) => console.error('violation', event.violatedDirective))"
        )
        page.goto(url + "/")

    def until(self, condition: str, seconds: float = 30) -> Any:
        """Wait for a JavaScript expression (the page's policy forbids Playwright's own way)."""
        deadline = time.monotonic() + seconds
        while not (value := self.page.evaluate(condition)):
            assert time.monotonic() < deadline, condition
            time.sleep(0.01)
        return value

    def set(self, **values: str) -> None:
        for name, value in values.items():
            self.page.evaluate(
                "([id, value]) => { const it = document.getElementById(id); it.value = value;"
                " it.dispatchEvent(new Event('input', { bubbles: true })) }",
                [name, value],
            )

    def answer(self, prompt: str = "abc", **values: str) -> None:
        """Run to the end."""
        self.page.wait_for_selector("#run:enabled")
        self.set(prompt=prompt, **values)
        self.page.click("#run")
        self.page.wait_for_selector("#run:enabled", timeout=240_000)

    def cells(self) -> list[dict[str, Any]]:
        return self.page.evaluate(
            "[...document.querySelectorAll('.cell')].map((cell) => ({ text: cell.textContent,"
            " confidence: Number(cell.style.getPropertyValue('--confidence')),"
            " isMask: cell.classList.contains('mask'),"
            " colour: getComputedStyle(cell).backgroundColor }))"
        )

    def text(self) -> str:
        return "".join(cell["text"] for cell in self.cells())

    def word(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")


@pytest.fixture
def opening(chromium) -> Iterator[Callable[..., Opened]]:
    """Opens pages; `allowed` is what their consoles may say."""
    opened: list[tuple[Opened, str | None]] = []

    def open_(url: str, allowed: str | None = None, **settings: Any) -> Opened:
        own = Opened(chromium.new_context(reduced_motion="reduce", **settings).new_page(), url)
        opened.append((own, allowed))
        return own

    yield open_
    for own, allowed in opened:
        told = [line for line in own.console if allowed is None or allowed not in line]
        strangers = [url for url in own.requests if not url.startswith((own.url, "data:"))]
        own.page.context.close()
        assert (told, strangers) == ([], [])


@pytest.fixture(scope="module")
def url(llm):
    with served(llm) as url:
        yield url


def completion(url: str, **fields) -> dict:
    body = {"model": "tiny", "prompt": "abc", "logprobs": 0, **FIELDS, **fields}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=240)
    assert response.status_code == 200, response.text
    return response.json()


def test_what_is_shown_is_what_the_api_answers(url, opening):
    page = opening(url)
    for seed in (3, 4):
        page.answer("def é(", seed=str(seed), max_tokens="50")
        wanted = completion(url, prompt="def é(", seed=seed, max_tokens=50)
        [choice], usage = wanted["choices"], wanted["usage"]
        assert page.text() == choice["text"]
        assert page.word("text") == "def é(" + choice["text"]
        assert page.word("tokens") == str(usage["completion_tokens"])
        passes = usage["completion_tokens_details"]["passes"]
        assert page.word("passes") == str(passes)
        assert page.word("per-pass") == f"{usage['completion_tokens'] / passes:.2f}"
        assert float(page.word("per-second")) > 0
        assert not any(cell["isMask"] for cell in page.cells())


def test_the_steps_of_each_block_are_counted(url, llm, opening):
    page = opening(url)
    page.answer(seed="6", max_tokens="40")
    params = SamplingParams(max_tokens=40, seed=6, temperature=0.7)
    [made] = llm.generate(["abc"], params)
    steps = made.steps_per_block
    told = page.page.get_attribute("#bars", "aria-label")
    assert told == f"Steps of each block: {', '.join(map(str, steps))}"
    assert page.word("blocks") == str(len(steps))
    assert page.word("per-block") == f"{sum(steps) / len(steps):.2f}"


def test_masks_are_seen_and_then_none(llm, opening):
    with served(llm, decode=paced(llm, 0.1)) as url:
        page = opening(url)
        page.page.wait_for_selector("#run:enabled")
        page.set(seed="2", max_tokens="9", steps_per_block="4")
        page.page.click("#run")
        counts = []
        while page.page.is_disabled("#run"):
            counts.append(sum(cell["isMask"] for cell in page.cells()))
        # "abc" and the first new token make a block of 4; then there are two blocks of 4.
        assert {1, 2, 3, 4} <= set(counts)
        assert sum(cell["isMask"] for cell in page.cells()) == 0
        assert len(page.cells()) == 9


def lightness(cell: dict) -> float:
    assert cell["colour"].startswith("oklch("), cell
    return float(cell["colour"].removeprefix("oklch(").split()[0])


def test_colours_follow_the_confidences_that_the_api_tells(url, opening):
    page = opening(url)
    page.answer(seed="5", max_tokens="40", temperature="0.3", confidence_threshold="0")
    wanted = completion(url, seed=5, max_tokens=40, temperature=0.3, confidence_threshold=0)[
        "choices"
    ][0]["logprobs"]["token_logprobs"]
    cells = page.cells()
    told = [cell["confidence"] for cell in cells]
    assert told == pytest.approx([2.718281828459045**value for value in wanted], rel=1e-9)
    ranked = sorted(cells, key=lambda cell: cell["confidence"])
    assert len({cell["colour"] for cell in cells}) > 5
    assert [lightness(cell) for cell in ranked] == sorted(lightness(cell) for cell in cells)


def contrast(page: Opened, back: str, front: str) -> float:
    """Of two colours as the browser paints them (WCAG 2.2, relative luminance)."""
    return page.page.evaluate(
        """([back, front]) => {
          const surface = new OffscreenCanvas(1, 1).getContext('2d',
            { willReadFrequently: true });
          const [a, b] = [back, front].map((colour) => {
            surface.fillStyle = colour;
            surface.fillRect(0, 0, 1, 1);
            const shares = [...surface.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
            const [red, green, blue] = shares.map((share) =>
              share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
          });
          return Math.max(a, b) / Math.min(a, b);
        }""",
        [back, front],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read_on(url, opening, scheme):
    page = opening(url, color_scheme=scheme)
    page.answer(seed="5", max_tokens="40")
    ink = page.page.evaluate("getComputedStyle(document.getElementById('text')).color")
    for share in (0, 0.25, 0.5, 0.75, 1):
        back = page.page.evaluate(
            "(share) => { const cell = document.querySelector('.cell');"
            " cell.style.setProperty('--confidence', share);"
            " return getComputedStyle(cell).backgroundColor }",
            share,
        )
        assert contrast(page, back, ink) >= 4.5, share
    for name in ("model", "status", "token", "rule-told", "run"):
        front, back = page.page.evaluate(
            "(id) => { const own = getComputedStyle(document.getElementById(id));"
            " const page = getComputedStyle(document.body).backgroundColor;"
            " return [own.color, own.backgroundColor === 'rgba(0, 0, 0, 0)' ? page"
            " : own.backgroundColor] }",
            name,
        )
        assert contrast(page, back, front) >= 4.5, name


def test_stop_keeps_what_is_there_and_frees_the_place(llm, opening):
    decode = paced(llm, 0.08)  # seconds until it ends by itself, on a busy machine too
    with served(llm, decode=decode, max_choices_in_flight=1) as url:
        page = opening(url)
        for how in ("button", "key"):
            page.page.wait_for_selector("#run:enabled")
            page.set(prompt="abc", seed="2", max_tokens="200")
            page.page.click("#run")
            page.until("document.getElementById('blocks').textContent >= 2")
            busy = httpx.post(
                f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=120
            )
            assert busy.status_code == 429
            page.page.click("#stop") if how == "button" else page.page.keyboard.press("Escape")
            page.page.wait_for_selector("#run:enabled")
            assert "stopped by you" in page.word("status")
            deadline = time.monotonic() + 60
            while llm.counters.running:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            whole = completion(url, seed=2, max_tokens=200)["choices"][0]["text"]
            kept = page.cells()[: int(page.word("tokens"))]
            text = "".join(cell["text"] for cell in kept)
            assert text
            assert whole.startswith(text)


def test_a_key_is_asked_for_and_a_wrong_one_told(llm, opening):
    with served(llm, keys=ApiKeys([RIGHT])) as url:
        page = opening(url, allowed="status of 401")
        assert page.page.is_visible("#key-form")
        assert page.page.is_disabled("#run")
        assert page.requests == [f"{url}{path}" for path in PAGE_FILES]
        page.page.fill("#key", "wrong")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#error:visible")
        refused = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"})
        assert page.word("error") == refused.json()["error"]["message"]
        page.page.fill("#key", RIGHT)
        page.page.keyboard.press("Enter")
        page.answer(seed="1", max_tokens="8")
        assert page.page.is_hidden("#key-form")
        assert page.page.is_hidden("#error")
        assert len(page.cells()) == 8
        kept = page.page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
            " + document.documentElement.outerHTML"
        )
        assert RIGHT not in kept
        page.page.click("#forget")
        assert page.page.is_disabled("#run")
        page.page.reload()
        assert page.page.is_visible("#key-form")


@pytest.fixture(scope="module")
def filling(folder):  # noqa: F811
    """A model that fills holes by what follows them."""
    with LLM.load(trained(folder, "filling", 0.9)) as llm:
        yield llm


def test_a_hole_is_filled_by_what_follows_it(filling, opening):
    with served(filling) as url:
        page = opening(url)
        page.page.wait_for_selector("#run:enabled")
        page.page.fill("#prompt", "CC58cc")
        page.page.evaluate("document.getElementById('prompt').setSelectionRange(1, 2)")
        page.page.click("#hole")
        assert page.page.input_value("#prompt") == "C"
        assert page.page.input_value("#suffix") == "58cc"
        for letter in "cbh":
            page.set(suffix=f"58{letter * 2}")
            page.answer("", temperature="0", rule="sequential", max_tokens="6")
            assert page.text() == letter.upper() * 2
            assert page.word("text") == f"{letter.upper() * 2}58{letter * 2}"
        page.set(prompt="C")
        page.page.click("#hole")
        assert page.page.input_value("#prompt") == "C58hh"
        assert page.page.is_hidden("#after")


def test_a_model_that_fills_no_holes_says_why(url, opening):
    page = opening(url)
    page.page.wait_for_selector("#run:enabled")
    assert page.page.is_hidden("#hole")
    assert "infill_rate" in page.word("no-hole")


def saying(text: str):
    """A source that writes this text, whatever is asked."""

    async def decode(tokens, params, choice, watch=False):
        own, size = list(text.encode()), 8
        for offset in range(0, len(own), size):
            part = own[offset : offset + size]
            step = {"offset": offset, "length": len(part), "step": 0}
            filled = {"places": [*range(len(part))], "tokens": part}
            sure = {"confidences": [0.5] * len(part)}
            yield {STEP: {**step, "places": [], "tokens": [], "confidences": []}}
            yield {STEP: {**step, "step": 1, **filled, **sure}}
            yield {
                "tokens": part,
                "passes": 1,
                "steps": 1,
                "finish_reason": "length" if offset + size >= len(own) else None,
                "stop_reason": None,
                "logprobs": [(-0.5, ())] * len(part),
                "margin": None,
            }

    return decode


def test_hostile_text_is_text(llm, opening):
    with served(llm, decode=told_as_tuples(saying(HOSTILE)), model_name=HOSTILE) as url:
        page = opening(url)
        page.answer(HOSTILE, max_tokens="128")
        assert page.text() == HOSTILE
        assert page.word("text") == HOSTILE * 2
        page.page.click(".cell >> nth=3")
        assert '"g"' in page.word("token")
        assert HOSTILE in page.word("model")
        assert page.page.title() == f"{HOSTILE} · CASCADE"
        assert page.page.evaluate("document.querySelectorAll('img, main script').length") == 0


def told_as_tuples(decode):
    """Log-probabilities as the engine's own type."""
    from cascade_model.text_stream import TokenLogprob

    async def own(*request, **watch):
        async for block in decode(*request, **watch):
            if "logprobs" in block:
                block["logprobs"] = [TokenLogprob(*told) for told in block["logprobs"]]
            yield block

    return own


def test_the_policy_forbids_what_it_should(url, opening):
    """The control: code and pictures that are none of ours do violate it, and that is seen."""
    page = opening(url, allowed="")
    stranger = "http://127.0.0.1:1/x"
    page.page.evaluate("document.body.append(document.createElement('script'))")
    page.page.evaluate(
        "(url) => { const own = document.createElement('img'); own.src = url;"
        " document.body.append(own) }",
        stranger,
    )
    page.until("document.querySelector('img').complete")
    assert any("violation img-src" in line for line in page.console)
    assert page.requests.pop() == stranger
    with pytest.raises(Exception, match="TrustedHTML"):
        page.page.evaluate("document.body.innerHTML = '<p>'")


def test_steps_that_are_told_twice_or_lost_change_nothing(llm, url, opening):
    """As after the loss of a sampler in mid-block, and for a reader that fell behind."""

    async def stuttering(tokens, params, choice, watch=False):
        steps, number = [], 0
        async for told in llm.stream_steps(tokens, params, choice):
            own = dataclasses.asdict(told)
            if isinstance(told, DenoisedStep):
                steps.append({STEP: own})
                continue
            cut = steps[: 1 + number % len(steps)]
            for step in [*cut, *steps] if number % 2 else steps[1::2]:
                yield step
            steps, number = [], number + 1
            yield own

    wanted = completion(url, seed=3, max_tokens=40)["choices"][0]
    with served(llm, decode=stuttering) as stutters:
        page = opening(stutters)
        page.answer(seed="3", max_tokens="40")
        assert page.text() == wanted["text"]
        assert len(page.cells()) == 40


def test_errors_are_the_apis_own_sentences(llm, url, opening):
    page = opening(url, allowed="status of 400")
    for fields in ({"max_tokens": 100_000}, {"steps_per_block": 0}, {"prompt": ""}):
        page.page.wait_for_selector("#run:enabled")
        page.answer(**({"prompt": "abc"} | {k: str(v) for k, v in fields.items()}))
        body = {"model": "tiny", "prompt": "abc", **FIELDS, **fields}
        refused = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert refused.status_code == 400
        assert page.word("error") == refused.json()["error"]["message"]
        assert "failed" in page.word("status")
        page.set(max_tokens="8", steps_per_block="")
    page.answer()
    assert page.page.is_hidden("#error")


def test_an_error_in_mid_stream_is_told_below_what_came(llm, opening):
    async def failing(tokens, params, choice, watch=False):
        count = 0
        async for each in paced(llm, 0)(tokens, params, choice, watch=watch):
            yield each
            count += STEP not in each
            if count == 3:
                raise ApiError(503, "The sampler has gone <b>.", type="server_error")

    with served(llm, decode=failing) as url:
        page = opening(url)
        page.answer(seed="3", max_tokens="40")
        assert page.word("error") == "The sampler has gone <b>."
        assert page.word("blocks") == "3"


def test_a_replay_goes_through_the_same_steps(url, opening):
    page = opening(url)
    page.answer(seed="3", max_tokens="20")
    whole, last = page.cells(), int(page.page.get_attribute("#scrub", "max"))
    seen, counted = [], []
    for place in range(last + 1):
        page.set(scrub=str(place))
        page.until(f"document.getElementById('moment').textContent.endsWith('{place} / {last}')"
                   if place else "document.querySelectorAll('.cell').length === 0")  # fmt: skip
        seen.append([cell["isMask"] for cell in page.cells()])
        counted.append((int(page.word("blocks")), int(page.word("tokens"))))
    assert seen[0] == []
    assert counted == sorted(counted)
    assert (counted[0], counted[-1][1]) == ((0, 0), 20)
    assert any(any(masks) for masks in seen)
    assert page.cells() == whole
    page.page.click("#play")
    page.until("document.getElementById('play').textContent === 'Pause'")
    page.page.click("#play")
    assert page.word("play") == "Replay"


def test_all_of_it_is_reached_by_keys_and_has_a_name(url, opening):
    page = opening(url)
    page.page.wait_for_selector("#run:enabled")
    nameless = page.page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((each) => each.labels.length === 0).map((each) => each.id)"
    )
    assert nameless == []
    page.page.focus("#prompt")
    page.set(max_tokens="12", seed="1")
    page.page.keyboard.press("Control+Enter")
    page.until("document.querySelectorAll('.cell:not(.mask)').length === 12")
    page.page.wait_for_selector("#play:enabled")
    page.page.focus("#prompt")
    reached = set()
    for _ in range(24):
        reached.add(
            page.page.evaluate("document.activeElement.id || document.activeElement.tagName")
        )
        page.page.keyboard.press("Tab")
    wanted = {"prompt", "run", "text", "play", "scrub", "rule", "temperature", "max_tokens", "seed"}
    assert wanted <= reached
    page.page.focus("#text")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowRight")
    assert page.word("token").startswith("Token 2 is ")
    assert page.word("token") != ""
    assert page.page.inner_text("#spoken") != ""


@pytest.mark.parametrize("width", [320, 390, 800, 1600])
def test_nothing_is_wider_than_the_screen(url, opening, width):
    page = opening(url, viewport={"width": width, "height": 700})
    page.answer("x" * 200, seed="1", max_tokens="40")
    page.page.click("details:last-of-type summary")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_knows_the_settings_as_the_api_does(url, opening):
    page = opening(url)
    names = "[...document.querySelectorAll('.settings input, .settings select')].map((e) => e.id)"
    assert set(page.page.evaluate(names)) <= CompletionRequest.model_fields.keys()
    rules = page.page.evaluate("[...document.getElementById('rule').options].map((e) => e.value)")
    assert rules == list(get_args(Rule))
    defaults = {each.name: each.default for each in dataclasses.fields(SamplingParams)}
    for name in ("confidence_threshold", "factor", "entropy_bound"):
        assert float(page.page.input_value(f"#{name}")) == defaults[name]
    for rule in rules:
        page.set(rule=rule)
        shown = page.page.evaluate(
            "[...document.querySelectorAll('[data-rule]')].filter((e) => !e.hidden)"
            ".map((e) => e.dataset.rule)"
        )
        assert shown == [rule] if rule in defaults else shown == []
        assert len(page.word("rule-told")) > 20


def test_the_line_for_curl_is_the_request(url, opening):
    page = opening(url)
    page.page.wait_for_selector("#run:enabled")
    page.set(prompt="it's", seed="3", max_tokens="5")
    page.page.click("details:last-of-type summary")
    line = page.word("curl")
    assert line.startswith(f"curl {url}/v1/completions")
    assert "'\\''" in line
    assert '"seed":3' in line


def test_only_the_page_and_health_are_open(llm):
    with TestClient(build_api(endpoint(llm))) as client:
        for path, (_, kind) in PAGE_FILES.items():
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.headers.items() >= {k.lower(): v for k, v in HEADERS.items()}.items()
            assert answer.headers["x-request-id"].startswith("req_")
            assert "tiny" not in answer.text
            assert client.post(path).status_code == 405
        require_error(client.get("/page.html"), 401, None, "invalid_api_key")
        require_error(client.get("/openapi.json"), 401, None, "invalid_api_key")
        assert 'data-key="needed"' in client.get("/").text
    with TestClient(build_api(endpoint(llm, keys=None))) as client:
        assert 'data-key="none"' in client.get("/").text


def test_the_page_names_no_other_place():
    """Nothing in the files is an address, but for the name of SVG, which nobody fetches."""
    for path in (Path(routes.__file__).parent / "page").glob("page.[chj]*"):
        assert set(re.findall(r"\w+://[^'\"` ]*", path.read_text())) <= {
            "http://www.w3.org/2000/svg"
        }
