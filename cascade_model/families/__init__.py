"""Published checkpoints: read with the published numbers, written back in the published layout.

`family` says what a family is, `fields` how its config.json is read, one file each holds the
families, `reading` and `exporting` use them. Nothing in a checkpoint's folder is ever run.
"""

from cascade_model.families.exporting import export
from cascade_model.families.family import Family
from cascade_model.families.gguf import gguf_template
from cascade_model.families.reading import (
    Checkpoint,
    Description,
    read_checkpoint,
    read_description,
    read_dtypes,
)
from cascade_model.families.registry import FAMILIES

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Description",
    "Family",
    "export",
    "gguf_template",
    "read_checkpoint",
    "read_description",
    "read_dtypes",
]
