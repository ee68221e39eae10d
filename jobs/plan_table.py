"""The numbers of a plan as lines for a person."""

from typing import Any

from cascade_model.metrics import duration

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "gathered": "gathered for a pass",
    "activations": "activations",
    "logits": "logits",
    "teacher": "teacher",
}


def table(report: dict[str, Any]) -> str:
    """Everything that `plan.run` found, by group."""
    rows = [*_head(report), *_memory(report), *_work(report), *_storage(report)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}   {value}".rstrip() for name, value in rows)


def _head(report: dict[str, Any]) -> list[tuple[str, str]]:
    few, many = report["fewest_ranks"], report["ranks"]
    ranks = str(many) if few == many else f"{few} to {many}; memory is that of {few}"
    rows = [(f"plan: {report['stage']}", f"{report['output']} (nothing was written)")]
    if report["earlier"] is not None:
        rows.append(("  the run there", report["earlier"]))
    if report["in_use"] is not None:
        rows.append(("  NOT NOW", report["in_use"]))
    return [
        *rows,
        ("parameters", f"{report['parameters']:,}"),
        ("ranks", f"{ranks}, {report['precision']}"),
    ]


def _memory(report: dict[str, Any]) -> list[tuple[str, str]]:
    parts = report["memory"]
    rows = [("memory of a rank, at most", size(report["memory_at_most"]))]
    rows += [(f"  {told}", size(parts[name])) for name, told in _PARTS.items() if parts[name]]
    other = "without" if report["recompute"] else "with"
    rows.append((f"  {other} trainer.recompute", size(report["memory_with_other_recompute"])))
    where = " (host)" if report["has_gpu"] else ""
    rows.append((f"  copy being saved{where}", size(parts["staging"])))
    rows.append((f"  or at the end the whole model{where}", size(parts["export"])))
    there = report["memory_there"]
    if there is not None:
        fits = report["memory_at_most"] <= there
        cure = "" if fits else ": DOES NOT FIT; lower trainer.sequences_per_forward, or recompute"
        rows.append(("  there is", f"{size(there)}{cure}"))
    return rows


def _work(report: dict[str, Any]) -> list[tuple[str, str]]:
    rate, seconds = report["tokens_per_second"], report["seconds"]
    told = f"{report['tokens']:,} in {report['steps']:,} steps, {report['epochs']:.2f} x the corpus"
    return [
        ("tokens", told),
        ("useful FLOPs", f"{report['flops']:.3g}, {report['flops_per_step']:.3g} a step"),
        ("tokens/s", "not known" if rate is None else f"{rate:,.0f}"),
        ("  basis", report["basis"]),
        ("time", "not known" if seconds is None else duration(seconds)),
    ]


def _storage(report: dict[str, Any]) -> list[tuple[str, str]]:
    kept = f"{report['kept_checkpoints']} x {size(report['checkpoint_bytes'])} of checkpoints"
    rest = f"{size(report['model_bytes'])} model, {size(report['metrics_bytes'])} metrics"
    rows = [
        ("storage", f"{size(report['storage'])}: {kept}, {rest}"),
        ("  at most meanwhile", size(report["storage_at_most"])),
    ]
    free, held = report["storage_free"], report["storage_held"]
    if free is not None:
        fits = report["storage_at_most"] <= free + held
        cure = "" if fits else ": DOES NOT FIT; lower trainer.keep_last, or choose another disk"
        own = f", and {size(held)} of this run" if held else ""
        rows.append(("  there is", f"{size(free)} free{own}{cure}"))
    return rows


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 1.23 GB."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"
