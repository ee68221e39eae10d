"""The last acts of a save, and what is removed: always COMMIT first, so that nothing looks whole
that is not."""

import contextlib
from collections.abc import Callable
from typing import Any

from cascade_model.checkpoint_files import (
    ATTEMPT,
    COMMIT,
    MANIFEST,
    Entry,
    File,
    commit_bytes,
    manifest_bytes,
    step_name,
    steps_in,
)
from cascade_model.checkpoint_reading import OtherFormat, attempt_of, committed, is_ours, score_of
from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch, Unfinished
from cascade_model.retention import Keep, is_measured, kept_steps


class Sealing:
    """The first rank's last acts of a save."""

    def __init__(
        self,
        target: Folder,
        attempt: str,
        facts: dict[str, Any],
        score: float | None,
        check: Callable[[], None],
    ) -> None:
        self.target, self.attempt = target, attempt
        self.is_tried = False
        """Whether a COMMIT may name this attempt: then nothing of it is removed."""
        self._facts, self._check = facts, check
        self._score = float(score) if score is not None and is_measured(score) else None

    def __call__(self, index: dict[str, Entry], files: dict[str, File]) -> None:
        """The manifest, then COMMIT, then nothing of other attempts.

        Another COMMIT of this step is of a damaged checkpoint, or of a run that took the folder:
        the lease tells which.
        """
        text = manifest_bytes(self._facts, index, files)
        written = (self.target / self.attempt).put(MANIFEST, lambda file: file.write(text))
        manifest = File(bytes=written.bytes, sha256=written.sha256)
        commit = commit_bytes(self._facts["step"], self.attempt, manifest, self._score)
        self._check()
        if self._put(commit) != commit:
            self.is_tried = False  # another's stands there
            self._check()
            self.target.remove(COMMIT)
            if self._put(commit) != commit:
                raise Unfinished(f"another process committed {self.target.url} meanwhile")
        with contextlib.suppress(Exception):  # what stays is tidied at the next start
            tidy_step(self.target, self.attempt)

    def _put(self, commit: bytes) -> bytes:
        """The COMMIT that stands there after ours was put; on a disk it is there or not."""
        self.is_tried = True
        try:
            return self.target.create(COMMIT, commit)
        except OSError:
            self.is_tried = not self.target.is_local or COMMIT in self.target.list()
            raise


def rate(target: Folder, step: int, score: float) -> None:
    """Give a committed step the held-out loss that was not known when it was saved.

    COMMIT is replaced in one move by one that differs in the score alone, so the checkpoint is
    whole throughout. A loss that is not finite is none.
    """
    if is_measured(score):
        attempt, manifest, _ = committed(target)
        target.replace(COMMIT, commit_bytes(step, attempt, manifest, float(score)))


def retain(folder: Folder, keep: Keep, step: int, damaged: set[int]) -> None:
    """Remove what the rule does not keep of the checkpoints up to this step.

    One after it is damaged, or the run would have gone on from there; its step will replace it.
    """
    scores, surplus = {}, []
    for each in steps_in(folder):
        if each > step:
            continue
        target = folder / step_name(each)
        with contextlib.suppress(OtherFormat):
            if not is_ours(target):
                continue  # nor to be removed
            is_committed, score = score_of(target)
            if is_committed and each not in damaged:
                scores[each] = score
            else:
                surplus.append(each)
    kept = kept_steps(scores, keep)
    for each in (*surplus, *scores):
        if each not in kept:
            discard(folder, each)


def discard(folder: Folder, step: int) -> None:
    """Remove a checkpoint; COMMIT goes first, so that a half-removed one is never taken for
    complete."""
    target = folder / step_name(step)
    target.remove(COMMIT)
    folder.remove(step_name(step))


def tidy(folder: Folder) -> None:
    """Remove what no COMMIT names."""
    for step in steps_in(folder):
        target = folder / step_name(step)
        names = target.list()
        if COMMIT in names:
            with contextlib.suppress(CheckpointMismatch):
                tidy_step(target, attempt_of(target))
        elif is_ours(target):
            folder.remove(step_name(step))


def tidy_step(target: Folder, attempt: str) -> None:
    """Remove other attempts at a step."""
    for name in target.list():
        if ATTEMPT.fullmatch(name) and name != attempt:
            target.remove(name)


def clear(target: Folder, attempt: str) -> None:
    """Remove an attempt that never came to its COMMIT."""
    target.remove(attempt)
    target.remove_if_empty()
