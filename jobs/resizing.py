"""In Ray's controller: before it changes the number of ranks, let the ones at work save.

Ray's elastic training ends all ranks without a word and starts the new number from the newest
checkpoint. This callback first asks them through the run folder to stop, and waits until the first
one says that everything is saved; so nothing is computed twice.
"""

import os
import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from cascade_model.commit import Folder
from jobs import run_folder

_LOOK_EVERY = 0.2
_LEAVE_WITHIN = "5"
"""Seconds that ranks get to leave their process group, in place of Ray's 30: those that still can
need less, and one that stands still would hold up the restart of the others."""


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Waits at most `patience` seconds; ranks that take longer lose what they did since a save."""

    def __init__(self, folder: str, launch: str, patience: float) -> None:
        self._folder, self._launch, self._patience = folder, launch, patience
        self._is_at_work = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Here, as Ray hands this setting on to no process."""
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", _LEAVE_WITHIN)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Ranks have begun, so there is somebody to ask."""
        self._is_at_work = True

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """They end, by whatever cause."""
        self._is_at_work = False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """A rank is lost, and the others cannot save without it."""
        self._is_at_work = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Also called before ranks are started that replace none."""
        folder = Folder(self._folder)
        if self._is_at_work and run_folder.wish_to_stop(folder, self._launch) is None:
            reason = f"going on with {resize_decision.num_workers} ranks"
            run_folder.ask_to_stop(folder, self._launch, reason, "resize")
            self._wait_until_saved(folder)
        wish = run_folder.wish_to_stop(folder, self._launch)
        if wish is not None and wish[1] != "end":
            run_folder.forget_stop(folder)

    def _wait_until_saved(self, folder: Folder) -> None:
        ends = time.monotonic() + self._patience
        while time.monotonic() < ends:
            wish = run_folder.wish_to_stop(folder, self._launch)
            if wish is None or wish[1] != "resize":
                return
            time.sleep(_LOOK_EVERY)
