"""The tokenizer engine of a corpus: a fast one, once it has shown on a sample that it is right."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cascade_model.commit import Folder
from cascade_model.fast_tokenizer import REFERENCE, admit
from pipelines.cleaning import cleaned
from pipelines.encoding import engine_version, tokenizer_of
from pipelines.isolation import DEATHS, attempt, died_at
from pipelines.parts import Job
from pipelines.pieces import Part
from pipelines.sampling import sampled

ENGINE = "engine.json"
"""In the work folder: which engine encodes the corpus."""
SAMPLE_BYTES = 1 << 20
"""Text on which a fast engine must give the reference engine's tokens, in characters."""
SAMPLE_PARTS = 8
"""Parts that the sample is taken from, at most: they are read whole."""


def choose_engine(job: Job, parts: Sequence[Part]) -> dict[str, Any]:
    """What the manifest says of the engine that encodes the corpus, settled once for a job.

    Where earlier checks died, it is tried in a child first: the reference engine is taken if that
    dies too, while deaths with another cause change nothing.
    """
    work = Folder(job.work)
    if not work.exists(ENGINE):
        with attempt(work, ENGINE) as deaths:
            kills = deaths == DEATHS and died_at(partial(_tried, job, parts), 0)[0] is not None
            found = (
                reference("the check of a fast engine killed its process")
                if kills
                else _checked(job, parts)
            )
        work.publish(ENGINE, json.dumps(found).encode())
    return json.loads(work.read_bytes(ENGINE))


def reference(note: str) -> dict[str, Any]:
    """The reference engine, without a check."""
    return {
        "name": REFERENCE,
        "version": engine_version(REFERENCE),
        "note": f"{note}; the reference engine is used",
        "sample_texts": 0,
        "sample_bytes": 0,
    }


def _tried(job: Job, parts: Sequence[Part], start: int, tell: Callable[[int, bool], None]) -> None:
    """The check as a trial of one step."""
    tell(start, False)
    _checked(job, parts)


def _checked(job: Job, parts: Sequence[Part]) -> dict[str, Any]:
    clean = partial(cleaned, cleaning=job.cleaning)
    sample = sampled(parts, job.documents, clean, job.held_out_rate, SAMPLE_BYTES, "engine sample:")
    found = admit(tokenizer_of(job.output, job.tokenizer_sha256), sample)
    names = ("name", "version", "note", "sample_texts", "sample_bytes")
    return {name: getattr(found, name) for name in names}
