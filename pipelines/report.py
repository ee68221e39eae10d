"""What a prepared corpus holds, for people and for programs: report.html and report.json.

Both lie beside the manifest and say the same numbers. They are made from the parts' own counts, and
the masks from what stands in the shards. Times belong to a run, not to the corpus, so the report is
no part of the corpus's digest, and a later run may write it anew.
"""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from cascade_model.commit import Folder
from cascade_model.manifest import Manifest
from cascade_model.schema import SPLITS
from pipelines.report_masks import masks_of
from pipelines.report_page import report_page

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
REPORT_VERSION = 1
_SHOWN_FILES = 20
_SUMS = ("documents", "characters", "bytes", "tokens", "rows", "padding")


def write_report(
    folder: Folder, manifest: Manifest, facts: list[dict[str, Any]], timing: dict[str, Any] | None
) -> None:
    """Write both files over what was there; the shards must lie in the folder by then.

    `facts` are the parts' counts in the order of the parts, `timing` what this run took (none when
    nothing was run).
    """
    report = make_report(folder, manifest, facts, timing)
    data = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    folder.replace(REPORT_JSON, data.encode())
    folder.replace(REPORT_HTML, report_page(report).encode())


def make_report(
    folder: Folder, manifest: Manifest, facts: list[dict[str, Any]], timing: dict[str, Any] | None
) -> dict[str, Any]:
    """The report as plain JSON values."""
    sources = _by_source(manifest, facts)
    totals = _summed(sources)
    _require_same(totals, manifest)
    return {
        "report_version": REPORT_VERSION,
        "digest": manifest.digest,
        "totals": totals,
        "sources": sources,
        "splits": {split: _split(manifest, facts, split) for split in SPLITS},
        "document_bytes": _lengths(facts, "document_bytes"),
        "document_tokens": _lengths(facts, "document_tokens"),
        "infill": asdict(manifest.infill) if manifest.infill else None,
        "masks": masks_of(folder, manifest),
        "tokenizer": {
            "sha256": manifest.tokenizer_sha256,
            "vocab_size": manifest.vocab_size,
            "engine": manifest.tokenizer_engine,
            "chat_template": manifest.chat_template,
        },
        "timing": timing,
        "noise": asdict(manifest.noise),
        "settings": manifest.prepare,
        "files": {
            "count": len(manifest.sources),
            "bytes": sum(file["bytes"] for file in manifest.sources),
            "first": list(manifest.sources[:_SHOWN_FILES]),
        },
    }


def _by_source(manifest: Manifest, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of each source in the order of its first part; in = out + dropped + dead holds."""
    shares = {s.name: s.share for split in SPLITS for s in manifest.splits[split].sources}
    found = []
    for name in dict.fromkeys(each["source"] for each in facts):
        mine = [each for each in facts if each["source"] == name]
        sums = Counter()
        for each in mine:
            for split in each["splits"].values():
                sums.update({key: split[key] for key in _SUMS})
        found.append(
            {
                "name": name,
                "share": shares.get(name),
                "documents_in": sum(each["documents_in"] for each in mine),
                "dropped": _reasons(mine, "dropped"),
                "dead": _reasons(mine, "dead"),
                **{key: sums[key] for key in _SUMS},
            }
        )
    return found


def _reasons(facts: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """Counts by reason, the most frequent first."""
    counts = Counter()
    for each in facts:
        counts.update(each[kind])
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _summed(sources: list[dict[str, Any]]) -> dict[str, int]:
    """All sources together."""
    sums = {key: sum(each[key] for each in sources) for key in ("documents_in", *_SUMS)}
    for kind in ("dropped", "dead"):
        sums[kind] = sum(sum(each[kind].values()) for each in sources)
    return sums


def _require_same(totals: dict[str, int], manifest: Manifest) -> None:
    """A report of other parts than the manifest's would be worse than none."""
    told = manifest.counts
    if any(totals[key] != told[key] for key in ("documents_in", "documents", "bytes", "tokens")):
        raise RuntimeError("the report's counts are not the manifest's")


def _split(manifest: Manifest, facts: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """A split's counts, and how full its sequences are."""
    sums = Counter()
    for each in facts:
        sums.update({key: each["splits"][split][key] for key in _SUMS})
    places = sums["rows"] * manifest.sequence_length
    return {
        **{key: sums[key] for key in _SUMS},
        "places": places,
        "padding_rate": sums["padding"] / places if places else 0.0,
        "shards": len(manifest.splits[split].shards),
    }


def _lengths(facts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Documents by the bit length of their size: bin b holds sizes 2^(b-1) .. 2^b - 1."""
    counts = [sum(column) for column in zip(*(each[name] for each in facts), strict=True)]
    held = [bit for bit, count in enumerate(counts) if count]
    bins = range(held[0], held[-1] + 1) if held else range(0)
    return {
        "bins": [
            {"low": 1 << bit - 1 if bit else 0, "high": (1 << bit) - 1, "count": counts[bit]}
            for bit in bins
        ]
    }
