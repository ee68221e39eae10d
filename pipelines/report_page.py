"""report.html: the report as one page that needs nothing else, offline, in light and dark.

Every number is a `<data>` element with its exact value and the JSON pointer of its place in
report.json. The page forbids itself scripts and outside files, whatever a document may hold.
"""

from collections.abc import Iterable
from typing import Any

from pipelines.charts import Mark, histogram, whole
from pipelines.markup import Html, element, join, visible
from pipelines.report_numbers import escaped, number, rate, rounded
from pipelines.report_sequences import masks_section
from pipelines.report_style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SOURCE_COLUMNS = ("documents_in", "documents", "tokens", "bytes", "rows", "padding")


def report_page(report: dict[str, Any]) -> str:
    """The whole page (HTML5) of a report that `make_report` made."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", "CASCADE corpus report"),
        element("style", Html(STYLE)),
    ]
    sections = (
        _headline,
        _documents,
        _lengths,
        _packing,
        masks_section,
        _tokenizer,
        _run,
        _settings,
    )
    body = element("body", *(section(report) for section in sections))
    return "<!doctype html>\n" + element("html", element("head", *head), body, lang="en") + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str | None]]) -> Html:
    lines = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    top = element("tr", *(element("th", name) for name in head))
    return element("table", element("thead", top), element("tbody", *lines))


def _headline(report: dict[str, Any]) -> Html:
    cards = [
        ("documents", "/totals/documents", None),
        ("tokens", "/totals/tokens", None),
        ("bytes of text", "/totals/bytes", None),
        ("sequences", "/totals/rows", None),
        ("train padding", "/splits/train/padding_rate", rate),
        ("masked in draw 0", "/masks/masked_rate", rate),
    ]
    if report["timing"]:
        cards.append(("tokens/s of this run", "/timing/tokens_per_second", rounded))
    shown = [
        element("div", number(report, pointer, show), element("span", name, class_="soft"),
                class_="card")
        for name, pointer, show in cards
    ]  # fmt: skip
    digest = element("p", "manifest digest ", element("code", report["digest"]), class_="soft")
    cards_row = element("div", *shown, class_="cards")
    return element("header", element("h1", "CASCADE corpus report"), digest, cards_row)


def _documents(report: dict[str, Any]) -> Html:
    """Where every document went, by source and by reason."""
    parts = [("out", "documents"), ("dropped", "dropped"), ("dead", "dead")]
    marks = [
        Mark(
            label=name,
            count=report["totals"][key],
            says=f"{name}: {report['totals'][key]:,} documents",
            pointer=f"/totals/{key}",
            kind=name,
        )
        for name, key in parts
    ]
    sum_line = [join("in ", number(report, "/totals/documents_in"), " =")]
    sum_line += [
        join(element("span", class_=f"key {name}"), number(report, f"/totals/{key}"), f" {name}")
        for name, key in parts
    ]
    head = ("source", "documents in", "out", "tokens", "bytes", "sequences", "padding", "share")
    rows = [_source_row(report, place) for place in range(len(report["sources"]))]
    reasons = [row for place in range(len(report["sources"])) for row in _reasons(report, place)]
    return element(
        "section",
        element("h2", "Documents"),
        whole(marks, "documents in = out + dropped + dead"),
        element("p", *sum_line),
        _table(head, rows),
        *_rearranged(report),
        element("h2", "Dropped and dead, by reason"),
        _table(("source", "fate", "reason", "documents"), reasons)
        if reasons
        else element("p", "Every document was used.", class_="soft"),
    )


def _rearranged(report: dict[str, Any]) -> Iterable[Html]:
    """How many documents were rearranged, where any were."""
    if report["infill"] is not None:
        count = number(report, "/infill/num_documents")
        drawn = number(report, "/infill/rate", rate)
        fact = " documents of train stand as prefix, suffix and middle: of those drawn, which are "
        yield element("p", count, fact, drawn, ", the ones that fit into a sequence.")


def _source_row(report: dict[str, Any], place: int) -> list[str]:
    source, where = report["sources"][place], f"/sources/{place}"
    share = "" if source["share"] is None else number(report, f"{where}/share")
    numbers = [number(report, f"{where}/{column}") for column in _SOURCE_COLUMNS]
    return [visible(source["name"]), *numbers, join(share, " / 1024") if share else ""]


def _reasons(report: dict[str, Any], place: int) -> Iterable[list[str]]:
    source = report["sources"][place]
    for fate in ("dropped", "dead"):
        for reason in source[fate]:
            pointer = f"/sources/{place}/{fate}/{escaped(reason)}"
            yield [visible(source["name"]), fate, visible(reason), number(report, pointer)]


def _lengths(report: dict[str, Any]) -> Html:
    """Both histograms, with bins that double."""
    charts = [
        element(
            "div",
            element("h2", title),
            histogram(_length_marks(report[name]["bins"], name, unit), title, width=400),
        )
        for name, title, unit in (
            ("document_bytes", "Document length in bytes", "bytes"),
            ("document_tokens", "Document length in tokens", "tokens"),
        )
    ]
    note = element("p", "Of cleaned documents; each bin is twice as wide as the one before.",
                   class_="soft")  # fmt: skip
    return element("section", element("div", *charts, class_="two"), note)


def _length_marks(bins: list[dict[str, int]], name: str, unit: str) -> list[Mark]:
    return [
        Mark(
            label=_short(each["low"]),
            count=each["count"],
            says=f"{each['low']:,} to {each['high']:,} {unit}: {each['count']:,} documents",
            pointer=f"/{name}/bins/{place}/count",
        )
        for place, each in enumerate(bins)
    ]


def _short(value: int) -> str:
    """A power of two as people read it: 512, 4Ki, 1Mi."""
    for unit in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{value}{unit}"
        value //= 1024
    return f"{value}Ti"


def _packing(report: dict[str, Any]) -> Html:
    columns = ("documents", "rows", "tokens", "padding", "shards")
    rows = [
        [
            split,
            *(number(report, f"/splits/{split}/{column}") for column in columns),
            number(report, f"/splits/{split}/padding_rate", rate),
        ]
        for split in report["splits"]
    ]
    head = ("split", "documents", "sequences", "tokens", "padding", "shards", "padding rate")
    return element("section", element("h2", "Packing"), _table(head, rows))


def _tokenizer(report: dict[str, Any]) -> Html:
    told = report["tokenizer"]
    rows = [["sha256", element("code", told["sha256"])]]
    rows += [["vocabulary", number(report, "/tokenizer/vocab_size")]]
    rows += [["chat template", visible(str(told["chat_template"]))]]
    for name, value in told["engine"].items():
        is_count = isinstance(value, int)
        cell = number(report, f"/tokenizer/engine/{name}") if is_count else visible(str(value))
        rows.append([f"engine: {name.replace('_', ' ')}", cell])
    return element("section", element("h2", "Tokenizer"), _table(("", ""), rows))


def _run(report: dict[str, Any]) -> Html:
    """What this run took; none for a report that was made from finished work."""
    timing = report["timing"]
    if timing is None:
        return element("section", element("h2", "This run"), element("p", "Nothing was timed."))
    rows = [["runner", str(timing["runner"])]]
    rows += [
        [name.replace("_", " "), number(report, f"/timing/{name}")]
        for name in ("num_workers", "seconds", "tokens_per_second")
    ]
    rows += [
        [f"seconds of {visible(name)}", number(report, f"/timing/rounds/{escaped(name)}")]
        for name in timing["rounds"]
    ]
    return element("section", element("h2", "This run"), _table(("", ""), rows))


def _settings(report: dict[str, Any]) -> Html:
    rows = [[visible(name), visible(value)] for name, value in _flat(report["settings"], "")]
    rows += [[f"noise.{name}", str(value)] for name, value in report["noise"].items()]
    files = [[visible(file["path"]), f"{file['bytes']:,}", file["sha256"][:16]]
             for file in report["files"]["first"]]  # fmt: skip
    counted = element(
        "p",
        number(report, "/files/count"),
        " files of ",
        number(report, "/files/bytes"),
        f" bytes; the first {len(files)}:",
    )
    return element(
        "section",
        element("h2", "Settings"),
        _table(("setting", "value"), rows),
        element("h2", "Source files"),
        counted,
        _table(("path", "bytes", "sha256"), files),
    )


def _flat(value: Any, name: str) -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names; the noise has lines of its own."""
    if not isinstance(value, dict):
        yield name, str(value)
        return
    for key, inner in value.items():
        if name or key != "noise":
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
