"""Write a model folder back in the layout of its published family, for other programs.

A model that was only converted gives its checkpoint back bit for bit; a trained one its weights in
the same layout. One that was made from an autoregressive checkpoint and trained into block
diffusion is written as A2D (`families.exporting`).
"""

from dataclasses import dataclass
from typing import Any

from cascade_model.errors import InputError
from jobs.cli import command


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Turn a model folder back into its published layout."""

    model: str
    """Model folder to export."""
    output: str
    """Folder to write; it must not exist or be empty."""
    like: str | None = None
    """Folder whose published config is used: the one this model was trained from. None: the
    model's own."""


def run(config: ExportConfig) -> dict[str, Any]:
    """Read and write; returns a summary."""
    from cascade_model.commit import require_writable
    from cascade_model.families import export
    from cascade_model.weights import load_model, read_published

    require_writable(config.output)
    published = read_published(config.like or config.model)
    if published is None:
        raise InputError(
            f"model={config.like or config.model} came from no published checkpoint; give "
            "--like with the folder it was trained from, if there is one"
        )
    model, tokenizer = load_model(config.model, dtype=None)
    export(model, config.output, published.config, dtypes=published.dtypes, tokenizer=tokenizer)
    print(f"wrote {config.output}: {model.config.family} layout")
    return {"output": config.output, "family": model.config.family}


main = command(ExportConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
