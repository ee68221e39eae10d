"""report.html: the report as one page that needs nothing else, offline, in light and dark.

Every number is a `<data>` element with its exact value and the JSON pointer of its place in
report.json. The page forbids itself scripts and outside files, whatever a document may hold.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pipelines.charts import Mark, histogram, whole
from pipelines.markup import Html, element, join, visible
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
    sections = (_headline, _documents, _lengths, _packing, _masks, _tokenizer, _run, _settings)
    body = element("body", *(section(report) for section in sections))
    return "<!doctype html>\n" + element("html", element("head", *head), body, lang="en") + "\n"


def _number(report: dict[str, Any], pointer: str, show: Callable[[Any], str] | None = None) -> Html:
    """A number of the report as text, with its exact value and place."""
    value = at(report, pointer)
    text = (show or _plain)(value)
    return element("data", text, value=repr(value), data_pointer=pointer)


def at(report: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901)."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        report = report[int(name)] if isinstance(report, list) else report[name]
    return report


def _escaped(name: str) -> str:
    """A name as one step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _rate(value: float) -> str:
    return f"{100 * value:.2f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


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
        ("train padding", "/splits/train/padding_rate", _rate),
        ("masked in draw 0", "/masks/masked_rate", _rate),
    ]
    if report["timing"]:
        cards.append(("tokens/s of this run", "/timing/tokens_per_second", _whole))
    shown = [
        element("div", _number(report, pointer, show), element("span", name, class_="soft"),
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
    sum_line = [join("in ", _number(report, "/totals/documents_in"), " =")]
    sum_line += [
        join(element("span", class_=f"key {name}"), _number(report, f"/totals/{key}"), f" {name}")
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
        element("h2", "Dropped and dead, by reason"),
        _table(("source", "fate", "reason", "documents"), reasons)
        if reasons
        else element("p", "Every document was used.", class_="soft"),
    )


def _source_row(report: dict[str, Any], place: int) -> list[str]:
    source, where = report["sources"][place], f"/sources/{place}"
    share = "" if source["share"] is None else _number(report, f"{where}/share")
    numbers = [_number(report, f"{where}/{column}") for column in _SOURCE_COLUMNS]
    return [visible(source["name"]), *numbers, join(share, " / 1024") if share else ""]


def _reasons(report: dict[str, Any], place: int) -> Iterable[list[str]]:
    source = report["sources"][place]
    for fate in ("dropped", "dead"):
        for reason in source[fate]:
            pointer = f"/sources/{place}/{fate}/{_escaped(reason)}"
            yield [visible(source["name"]), fate, visible(reason), _number(report, pointer)]


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
            *(_number(report, f"/splits/{split}/{column}") for column in columns),
            _number(report, f"/splits/{split}/padding_rate", _rate),
        ]
        for split in report["splits"]
    ]
    head = ("split", "documents", "sequences", "tokens", "padding", "shards", "padding rate")
    return element("section", element("h2", "Packing"), _table(head, rows))


def _masks(report: dict[str, Any]) -> Html:
    """The histogram of the stored masks, and sequences with their masks."""
    masks = report["masks"]
    shape = masks["histogram"]
    marks = [
        Mark(
            label=str(each["low"]),
            count=each["count"],
            says=f"{each['low']} to {each['high']} of {shape['unit_size']} places masked: "
            f"{each['count']:,} {shape['unit']}s",
            pointer=f"/masks/histogram/bins/{place}/count",
        )
        for place, each in enumerate(shape["bins"])
    ]
    read = element(
        "p",
        "Read from ",
        _number(report, "/masks/sequences_read"),
        f" sequences of {masks['split']} in ",
        _number(report, "/masks/shards_read"),
        " shards: ",
        _number(report, "/masks/masked"),
        " of ",
        _number(report, "/masks/maskable"),
        " maskable places are masked in the stored draw 0 (",
        _number(report, "/masks/masked_rate", _rate),
        "). Below: masked places of a ",
        f"{shape['unit']}, over ",
        _number(report, "/masks/histogram/units"),
        f" {shape['unit']}s that are maskable throughout.",
        class_="soft",
    )
    title = f"Masked places of a {shape['unit']} of {shape['unit_size']}"
    shown = [piece for place in range(len(masks["shown"])) for piece in _sequence(report, place)]
    note = element(
        "p",
        f"The first {masks['shown_tokens']} places of sequences of {masks['split']}. A box is a "
        "masked place; rest on it to see the true token. A dashed line is a document border.",
        class_="soft",
    )
    return element(
        "section",
        element("h2", title),
        read,
        histogram(marks, title),
        element("h2", "Masked sequences"),
        note,
        *shown,
    )


def _sequence(report: dict[str, Any], place: int) -> list[Html]:
    where = f"/masks/shown/{place}"
    line = element(
        "p",
        "sequence ",
        _number(report, f"{where}/sequence"),
        ": ",
        _number(report, f"{where}/masked"),
        " of ",
        _number(report, f"{where}/maskable"),
        " masked",
    )
    return [line, element("pre", *map(_piece, report["masks"]["shown"][place]["pieces"]))]


def _piece(piece: dict[str, Any]) -> Html:
    """A run of text, a mask, a border or padding."""
    kind = piece["kind"]
    if kind == "border":
        return element("span", class_="border", title="document border")
    if kind == "pad":
        return element("span", f"⟨{piece['count']} padding⟩", class_="pad")
    text = visible(piece["text"])
    if kind == "mask":
        width = f"width:{min(max(len(text), 1), 24)}ch"
        return element("b", class_="mask", style=width, title=f"“{text}”, token {piece['token']}")
    return element("span", text, class_=kind)


def _tokenizer(report: dict[str, Any]) -> Html:
    told = report["tokenizer"]
    rows = [["sha256", element("code", told["sha256"])]]
    rows += [["vocabulary", _number(report, "/tokenizer/vocab_size")]]
    rows += [["chat template", visible(str(told["chat_template"]))]]
    for name, value in told["engine"].items():
        is_count = isinstance(value, int)
        cell = _number(report, f"/tokenizer/engine/{name}") if is_count else visible(str(value))
        rows.append([f"engine: {name.replace('_', ' ')}", cell])
    return element("section", element("h2", "Tokenizer"), _table(("", ""), rows))


def _run(report: dict[str, Any]) -> Html:
    """What this run took; none for a report that was made from finished work."""
    timing = report["timing"]
    if timing is None:
        return element("section", element("h2", "This run"), element("p", "Nothing was timed."))
    rows = [["runner", str(timing["runner"])]]
    rows += [
        [name.replace("_", " "), _number(report, f"/timing/{name}")]
        for name in ("num_workers", "seconds", "tokens_per_second")
    ]
    rows += [
        [f"seconds of {visible(name)}", _number(report, f"/timing/rounds/{_escaped(name)}")]
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
        _number(report, "/files/count"),
        " files of ",
        _number(report, "/files/bytes"),
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
