"""The part of the report's page that shows the masks: a histogram, and sequences to look at."""

from typing import Any

from pipelines.charts import Mark, histogram
from pipelines.markup import Html, element, visible
from pipelines.report_numbers import number, rate


def masks_section(report: dict[str, Any]) -> Html:
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
        number(report, "/masks/sequences_read"),
        f" sequences of {masks['split']} in ",
        number(report, "/masks/shards_read"),
        " shards: ",
        number(report, "/masks/masked"),
        " of ",
        number(report, "/masks/maskable"),
        " maskable places are masked in the stored draw 0 (",
        number(report, "/masks/masked_rate", rate),
        "). Below: masked places of a ",
        f"{shape['unit']}, over ",
        number(report, "/masks/histogram/units"),
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
        number(report, f"{where}/sequence"),
        f" of source {visible(report['masks']['shown'][place]['source'])}: ",
        number(report, f"{where}/masked"),
        " of ",
        number(report, f"{where}/maskable"),
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
