"""The report says what the corpus holds, in two files that agree, and runs nothing it shows."""

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus, SequenceRows
from cascade_model.manifest import Manifest
from pipelines.markup import Html, element, join, visible
from pipelines.prepare import prepare
from pipelines.report import REPORT_HTML, REPORT_JSON, make_report, write_report
from pipelines.report_masks import mask_histogram
from pipelines.report_numbers import at, plain, rate, rounded
from pipelines.report_page import report_page
from tests.pipelines.config_making import config_for

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</pre></body><h1 id=owned>owned</h1><svg onload=alert(1)> \" ' & &lt;b&gt; \u202edesrever "
)
TIMING = {
    "seconds": 2.5,
    "tokens_per_second": 40000.25,
    "runner": "local",
    "num_workers": 1,
    "rounds": {"pack": 1.25, "mask": 0.5},
}


def by_bit_length(sizes) -> list[int]:
    """65 counts of the sizes by their bit length."""
    return np.bincount([int(size).bit_length() for size in sizes], minlength=65).tolist()


def facts_of(manifest: Manifest, texts: list[str], source: str) -> list[dict]:
    """The counts of a byte-tokenised corpus as one part would tell them, from its texts."""
    splits = {
        name: {
            "rows": split.num_sequences,
            "tokens": split.num_tokens,
            "documents": split.num_documents,
            "bytes": split.num_bytes,
            "characters": split.num_bytes,
            "padding": split.num_sequences * manifest.sequence_length - split.num_tokens,
        }
        for name, split in manifest.splits.items()
    }
    sizes = [len(text.encode()) for text in texts]
    return [
        {
            "source": source,
            "documents_in": len(texts),
            "dropped": {},
            "dead": {},
            "first_dead": None,
            "rearranged": 0,
            "splits": splits,
            "document_bytes": by_bit_length(sizes),
            "document_tokens": by_bit_length(sizes),
        }
    ]


@pytest.fixture(scope="module")
def corpus(real_documents, tmp_path_factory):
    """A folder with a corpus of real documents and a hostile one, its manifest and its facts."""
    texts = [HOSTILE * 40, *real_documents[:20]]
    folder = tmp_path_factory.mktemp("report")
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = folder / "corpus"
    manifest = prepare(config_for(output, path))
    return Folder(output), manifest, facts_of(manifest, texts, "web<b>&'\"")


@pytest.fixture(scope="module")
def report(corpus) -> dict:
    return make_report(*corpus, TIMING)


class Page(HTMLParser):
    """Elements with their attributes and own text, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag != "meta":
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]].append(data)

    def named(self, tag: str) -> list[tuple[dict, str]]:
        """Attributes and text of every element of a name."""
        found = zip(self.elements, self.texts, strict=True)
        return [(attrs, "".join(text)) for (name, attrs), text in found if name == tag]


def numbers_of(page: Page) -> dict[str, str]:
    """Exact value by JSON pointer, of numbers and of chart marks."""
    shown = [(a["data-pointer"], a["value"]) for a, _ in page.named("data")]
    drawn = [(a["data-pointer"], a["data-value"]) for a, _ in page.named("rect")]
    for pointer, value in shown + drawn:
        assert dict(shown + drawn)[pointer] == value
    return dict(shown + drawn)


def assert_same_numbers(page: Page, report: dict) -> None:
    """Every number on the page is the report's at its pointer, and the main ones are there."""
    numbers = numbers_of(page)
    for pointer, value in numbers.items():
        assert value == repr(at(report, pointer)), pointer
    for attrs, text in page.named("data"):
        value = at(report, attrs["data-pointer"])
        shown = (
            [plain(value)]
            if isinstance(value, int)
            else [plain(value), rate(value), rounded(value)]
        )
        assert text in shown, attrs
    wanted = {f"/totals/{name}" for name in ("documents_in", "documents", "dropped", "dead")}
    wanted |= {"/totals/tokens", "/splits/train/padding_rate", "/masks/masked_rate"}
    wanted |= {"/timing/tokens_per_second", "/timing/rounds/pack"}
    for name in ("document_bytes", "document_tokens", "masks/histogram"):
        bins = at(report, f"/{name}")["bins"]
        wanted |= {f"/{name}/bins/{place}/count" for place in range(len(bins))}
    assert wanted <= numbers.keys()


def test_both_files_say_the_same_numbers(corpus, report):
    folder, manifest, facts = corpus
    write_report(folder, manifest, facts, TIMING)
    assert json.loads(folder.read_bytes(REPORT_JSON)) == report
    text = folder.read_bytes(REPORT_HTML).decode()
    assert text == report_page(report)
    assert_same_numbers(Page(text), report)


def test_the_check_of_the_numbers_can_fail(report):
    text = report_page(report).replace('value="64"', 'value="65"', 1)
    text = re.sub(r'data-value="(\d+)"', lambda m: f'data-value="{int(m[1]) + 1}"', text, count=1)
    with pytest.raises(AssertionError):
        assert_same_numbers(Page(text), report)


def test_a_later_run_tells_its_own_times_and_nothing_else_differs(corpus, report):
    folder, manifest, facts = corpus
    write_report(folder, manifest, facts, TIMING)
    write_report(folder, manifest, facts, None)
    later = json.loads(folder.read_bytes(REPORT_JSON))
    assert later == {**report, "timing": None}
    assert "Nothing was timed" in folder.read_bytes(REPORT_HTML).decode()
    assert Corpus.open(folder.url).digest == manifest.digest


def test_counts_are_the_sums_of_the_parts(corpus, report):
    folder, manifest, facts = corpus
    totals = report["totals"]
    assert totals["documents_in"] == manifest.counts["documents_in"]
    assert totals["tokens"] == sum(split.num_tokens for split in manifest.splits.values())
    assert sum(b["count"] for b in report["document_bytes"]["bins"]) == totals["documents_in"]
    assert report["digest"] == manifest.digest
    for name, split in report["splits"].items():
        assert split["places"] == manifest.splits[name].num_sequences * manifest.sequence_length
        assert split["padding_rate"] == split["padding"] / split["places"]
    with pytest.raises(RuntimeError, match="not the manifest's"):
        make_report(folder, manifest, facts * 2, None)


def test_each_document_is_in_the_bin_of_its_length(corpus, report):
    bins = report["document_bytes"]["bins"]
    for before, after in itertools.pairwise(bins):
        assert after["low"] == before["high"] + 1 == 2 * before["low"]
    [hostile] = [b for b in bins if b["low"] <= len((HOSTILE * 40).encode()) <= b["high"]]
    assert hostile["count"] >= 1
    assert bins[0]["count"] > 0 < bins[-1]["count"]


def test_sources_and_reasons_add_up_and_the_most_frequent_comes_first(corpus):
    folder, manifest, [facts] = corpus
    half = {**facts, "source": "other/~x", "dropped": {"short": 2, "empty": 5}, "dead": {"cut": 1}}
    half["documents_in"] += 8
    nothing = dict.fromkeys(facts["splits"]["train"], 0)
    half["splits"] = dict.fromkeys(facts["splits"], nothing)
    half["documents_in"] = 8
    counts = {**manifest.counts, "documents_in": manifest.counts["documents_in"] + 8}
    report = make_report(folder, replace(manifest, counts=counts), [facts, half], TIMING)
    assert [source["name"] for source in report["sources"]] == [facts["source"], "other/~x"]
    assert list(report["sources"][1]["dropped"]) == ["empty", "short"]
    totals = report["totals"]
    assert (totals["dropped"], totals["dead"]) == (7, 1)
    assert totals["documents_in"] == totals["documents"] + totals["dropped"] + totals["dead"]
    numbers = numbers_of(Page(report_page(report)))
    assert numbers["/sources/1/dropped/empty"] == "5"
    assert numbers["/sources/1/dead/cut"] == "1"


def test_the_shown_pieces_are_the_stored_sequence(corpus, report):
    folder, manifest, _ = corpus
    opened = Corpus.open(folder.url)
    tokenizer = opened.tokenizer()
    assert len(report["masks"]["shown"]) == 12
    for shown in report["masks"]["shown"]:
        rows = opened.rows(np.array([shown["sequence"]]))
        masks = [piece["token"] for piece in shown["pieces"] if piece["kind"] == "mask"]
        assert masks == rows.tokens[rows.is_masked].tolist()
        assert shown["masked"] == len(masks)
        assert shown["source"] == manifest.splits["train"].sources[0].name
        borders = sum(piece["kind"] == "border" for piece in shown["pieces"])
        assert borders == rows.is_start[:, 1:].sum()
        padding = sum(piece.get("count", 0) for piece in shown["pieces"])
        assert padding == (rows.tokens == manifest.pad_id).sum()
        # Text is cut at masks, so compare what is ASCII, which no cut can split.
        plain = "".join(piece.get("text", "") for piece in shown["pieces"])
        whole = tokenizer.decode(rows.tokens[0][rows.is_maskable[0]], skip_special=False)
        assert [c for c in plain if c.isascii()] == [c for c in whole if c.isascii()]


def rows_with(masked: np.ndarray) -> SequenceRows:
    """Sequences of which only the masks matter."""
    count, length = masked.shape
    return SequenceRows(
        sequence_ids=np.arange(count, dtype=np.uint64),
        tokens=np.zeros((count, length), dtype=np.int64),
        is_maskable=np.ones((count, length), dtype=bool),
        thresholds=np.zeros((count, 1), dtype=np.uint32),
        is_masked=masked,
        is_start=np.zeros((count, length), dtype=bool),
    )


@pytest.mark.parametrize(("per", "size"), [("block", 8), ("block", 32), ("sequence", 64)])
def test_a_unit_is_counted_in_the_bin_of_its_masked_places(corpus, per, size):
    manifest = replace(corpus[1], noise=NoiseConfig(block_size=min(size, 32), per=per))
    units = np.arange(size)[None, :] < np.arange(size + 1)[:, None]  # 0, 1, .. size masked
    missing = -len(units) % (64 // size)
    units = np.concatenate([units, np.ones((missing, size), dtype=bool)])
    rows = rows_with(units.reshape(-1, 64))
    rows.is_maskable.reshape(-1, size)[size + 1 :, 0] = False  # fillers do not count
    shape = mask_histogram(rows, manifest)
    assert shape["units"] == size + 1
    bins = shape["bins"]
    assert len(bins) == min(size + 1, 20)
    assert (bins[0]["low"], bins[-1]["high"]) == (0, size)
    for each in bins:
        assert each["count"] == each["high"] - each["low"] + 1


def test_the_histogram_of_a_real_corpus_is_flat_and_of_a_clipped_one_is_not(corpus, report):
    _, manifest, _ = corpus

    def spread(masks):
        counts = np.array([b["count"] for b in masks["histogram"]["bins"]])
        return counts.max() / max(counts.min(), 1)

    assert spread(report["masks"]) < 1.5
    clipped = np.random.default_rng(0).random((2000, 64)) < 0.5
    assert spread({"histogram": mask_histogram(rows_with(clipped), manifest)}) > 1.5


def hostile(report: dict) -> dict:
    """The report with other people's HTML wherever a corpus, a path or a setting may bring it."""
    source = {**report["sources"][0], "name": HOSTILE, "dead": {HOSTILE: 3}}
    shown = {
        **report["masks"]["shown"][0],
        "source": HOSTILE,
        "pieces": [
            {"kind": "text", "text": HOSTILE},
            {"kind": "mask", "text": HOSTILE, "token": 7},
            {"kind": "prompt", "text": HOSTILE},
        ],
    }
    tokenizer = {"chat_template": HOSTILE, "engine": {"note": HOSTILE}}
    files = {"first": [{"path": HOSTILE, "bytes": 1, "sha256": "0" * 64}]}
    return {
        **report,
        "sources": [source],
        "masks": {**report["masks"], "shown": [shown]},
        "tokenizer": {**report["tokenizer"], **tokenizer},
        "timing": {**TIMING, "rounds": {HOSTILE: 1.0}},
        "settings": {"source": {HOSTILE: HOSTILE}},
        "files": {**report["files"], **files},
    }


def assert_all_is_text(page: Page) -> None:
    """The hostile text is there in whole, and none of it is an element."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "a", "object"}
    assert len(page.named("h1")) == 1
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    texts = [text for _, text in page.named("span") + page.named("td")]
    assert any(visible(HOSTILE) in text for _, text in page.named("p"))
    assert texts.count(visible(HOSTILE)) >= 8
    assert any(visible(HOSTILE) in attrs["title"] for attrs, _ in page.named("b"))


def test_nothing_of_a_document_becomes_markup(report):
    text = report_page(hostile(report))
    assert_all_is_text(Page(text))
    assert "\u202e" not in "".join("".join(each) for each in Page(text).texts)
    numbers = numbers_of(Page(text))
    assert numbers[f"/sources/0/dead/{HOSTILE.replace('~', '~0').replace('/', '~1')}"] == "3"


def test_the_check_for_markup_can_fail(report, monkeypatch):
    monkeypatch.setattr("pipelines.markup.escape", str)
    with pytest.raises(AssertionError):
        assert_all_is_text(Page(report_page(hostile(report))))


def test_the_page_needs_nothing_from_elsewhere(report):
    text = report_page({**report, "masks": {**report["masks"], "shown": []}})
    assert any(
        "default-src 'none'" in attrs.get("content", "") for attrs, _ in Page(text).named("meta")
    )
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)


def test_numbers_are_shown_as_people_read_them():
    assert [plain(1234567), plain(0), plain(2.5)] == ["1,234,567", "0", "2.50"]
    assert [rate(0.5012), rate(0.0), rounded(40000.25)] == ["50.12 %", "0.00 %", "40,000"]
    assert at({"a/b": [{"~": 3}]}, "/a~1b/0/~0") == 3


def test_markup_escapes_everything_but_itself():
    assert element("p", "<b>", title='"&') == '<p title="&quot;&amp;">&lt;b&gt;</p>'
    assert element("p", element("b", "x"), None, class_=None) == "<p><b>x</b></p>"
    assert element("rect", data_value=3) == '<rect data-value="3"></rect>'
    assert isinstance(join("a", Html("<i>")), Html)
    assert join("a&", Html("<i>")) == "a&amp;<i>"
    assert visible("a\tb\nc\x00\u2066") == "a\tb\nc⟨U+0000⟩⟨U+2066⟩"


def test_a_browser_shows_the_numbers_and_runs_nothing(corpus, report, tmp_path, chromium):
    def opened(path: Path, scheme: str):
        """The page as a tab without a network shows it."""
        size = {"width": 1000, "height": 2600}
        tab = chromium.new_context(offline=True, viewport=size, color_scheme=scheme).new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        return tab

    folder, manifest, facts = corpus
    write_report(folder, manifest, facts, TIMING)
    page, page_of_others = Path(folder.path(REPORT_HTML)), tmp_path / "hostile.html"
    requests: list[str] = []
    shown = Page(opened(page, "light").content())
    assert_same_numbers(shown, report)
    assert next(text for _, text in shown.named("title")) == "CASCADE corpus report"
    page_of_others.write_text(report_page(hostile(report)))
    shown = Page(opened(page_of_others, "light").content())
    assert_all_is_text(shown)
    assert next(text for _, text in shown.named("title")) == "CASCADE corpus report"
    assert requests == [page.as_uri(), page_of_others.as_uri()]
    for scheme in ("light", "dark"):
        opened(page, scheme).screenshot(path=tmp_path / f"{scheme}.png")
    pictures = [pixels(tmp_path / f"{scheme}.png") for scheme in ("light", "dark")]
    light, dark = pictures
    assert light.shape == dark.shape == (2600, 1000, 3)
    assert light[5, 5].mean() > 200 > 60 > dark[5, 5].mean()
    for picture in pictures:  # bars, boxes and letters: many colours, and most of it background
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    target = os.environ.get("CASCADE_REPORT_PICTURE")
    if target:
        shutil.copy(tmp_path / "light.png", target)


def pixels(path: Path) -> np.ndarray:
    """A PNG's colours, uint8 [height, width, 3]."""
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))
