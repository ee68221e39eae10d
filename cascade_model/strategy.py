"""The general denoising strategy: what the requests of this project are decoded by.

It composes a schedule, a rule and the options of `SamplingParams`. Published samplers with laws of
their own are strategies too (`presets`). The work on whole rows of logits is torch's; what is kept
of the few places of a block is plain Python: a pass of a small network takes no longer than some
hundred calls on tiny tensors.
"""

from itertools import compress

import numpy as np
import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.config import ModelConfig
from cascade_model.decisions import (
    editing_margin,
    logprobs_of,
    remasking_margin,
    unmasking_margin,
)
from cascade_model.drawing import draw_tokens, most_probable, position_noise, uniforms
from cascade_model.model import never_emitted
from cascade_model.noise import POSITION
from cascade_model.passes import Prediction
from cascade_model.sampling import SamplingParams
from cascade_model.schedules import masks_left
from cascade_model.unmasking import RULES, Drawn, choose, probability

Written = dict[int, int]
"""Tokens by their places on the canvas."""


class General:
    """One request's strategy; keeps no state but the window's."""

    def __init__(
        self, config: ModelConfig, params: SamplingParams, is_given: Tensor, choice: int = 0
    ) -> None:
        self.config, self.params, self.choice = config, params, choice
        self.is_told = params.logprobs is not None
        """Whether a window is to keep the log-probabilities of what is written."""
        self._is_given: list[bool] = is_given.tolist()
        self._stop_ids, self._ends = params.end_ids(config), config.end_ids
        ends = self._ends if params.suppress_eos == "token" else ()
        banned = sorted({*never_emitted(config), *ends})
        self._banned = torch.tensor(banned, device=is_given.device)

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether all places that will be kept are filled, or all up to a token that ends it."""
        kept = canvas[window.start : window.keep].tolist()
        if self.config.mask_id in kept:
            return self._has_end(window, kept[: kept.index(self.config.mask_id)])
        if self.params.editing_threshold is None or window.is_spent:
            return True
        return window.is_settled or window.post_steps >= self.params.max_post_steps

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The places to predict: the masked ones, and the written ones where they may change."""
        revises, mask = self._revises(window), self.config.mask_id
        block = canvas[window.start : window.end].tolist()
        wanted = [
            place
            for place, token in enumerate(block, start=window.start)
            if token == mask or (revises and not self._is_given[place])
        ]
        return torch.tensor(wanted, dtype=torch.int64, device=canvas.device)

    @torch.inference_mode()
    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """What a step writes, from the predictions it asked for; bans ids in their logits."""
        places, mask = prediction.places.tolist(), self.config.mask_id
        block = canvas[window.start : window.end].tolist()
        logits = prediction.logits.index_fill_(-1, self._banned, float("-inf"))
        if not self._revises(window):
            return _change(self._unmask(window, block, places, logits), canvas)
        seen = {place: block[place - window.start] for place in places}
        old = {place: token for place, token in seen.items() if token != mask}
        is_open = torch.tensor([token == mask for token in seen.values()], device=logits.device)
        masked = [place for place in places if place not in old]
        revise = self._edit if self.params.editing_threshold is not None else self._remask
        written = self._unmask(window, block, masked, logits[is_open])
        return _change(written | revise(window, old, logits[~is_open]), canvas)

    def _has_end(self, window: Window, tokens: list[int]) -> bool:
        """Whether a token that ends the completion was written among the window's first tokens."""
        return any(
            token in self._stop_ids and not self._is_given[place]
            for place, token in enumerate(tokens, start=window.start)
        )

    def _unmask(
        self, window: Window, block: list[int], places: list[int], logits: Tensor
    ) -> Written:
        if not places:
            window.post_steps += 1
            return {}
        key = (self.choice, window.number, window.step, [place - window.start for place in places])
        drawn = Drawn(logits, draw_tokens(logits, self.params, *key))
        tokens = drawn.tokens.tolist()
        scores = self._scores(drawn, key)
        order = self._order(scores, key)
        if self.params.suppress_eos == "confidence":
            is_end = [token in self._ends for token in tokens]
            scores, order = (np.where(is_end, -np.inf, values) for values in (scores, order))
        bounds = self._bounds(window, block.count(self.config.mask_id))
        taken = choose(scores, order, *bounds, self.params)
        written = dict(compress(zip(places, tokens, strict=True), taken))
        self._tell(window, written, drawn, taken)
        if self.params.report_margin:
            margin = unmasking_margin(drawn, scores, order, bounds, taken, self.params, key)
            window.margin = min(window.margin, margin)
        return written

    def _scores(self, drawn: Drawn, key: tuple) -> np.ndarray:
        """How the rule rates each place, float [m]."""
        score = RULES[self.params.rule].score
        if score is None:
            return uniforms(POSITION, self.params.seed, *key)
        return score(drawn).cpu().numpy()

    def _order(self, scores: np.ndarray, key: tuple) -> np.ndarray:
        """What the places are ranked by: the scores, or their logarithms with noise, float64."""
        temperature = self.params.position_temperature
        if temperature == 0:
            return scores
        wide = torch.from_numpy(scores).double()
        logs = wide if RULES[self.params.rule].is_log else wide.clamp(min=1e-30).log()
        return logs.numpy() + temperature * position_noise(self.params.seed, *key)

    def _bounds(self, window: Window, masks: int) -> tuple[int, int]:
        """How many positions this step must commit at least, and may at most."""
        planned = masks_left(
            self.params.schedule, window.num_masked, window.step + 1, window.max_steps
        )
        still = min(self.params.min_steps_per_block, window.max_steps) - window.step - 1
        return max(1, masks - planned), max(1, masks - max(0, still))

    def _revises(self, window: Window) -> bool:
        """Whether written places may change in the step to come."""
        if self.params.editing_threshold is not None:
            return True
        return self.params.remask_threshold is not None and not window.is_last_step

    def _remask(self, window: Window, old: Written, logits: Tensor) -> Written:
        """Mask again what has lost confidence; each place once, so that a window ends."""
        threshold = self.params.remask_threshold
        assert threshold is not None
        tokens = torch.tensor(list(old.values()), dtype=torch.int64, device=logits.device)
        now = probability(Drawn(logits, tokens)).cpu().numpy()
        if self.params.report_margin:
            is_new = np.array([place not in window.revised for place in old], dtype=bool)
            window.margin = min(window.margin, remasking_margin(now[is_new], threshold))
        doubted = set(compress(old, now < threshold)) - window.revised
        window.revised |= doubted
        return dict.fromkeys(doubted, self.config.mask_id)

    def _edit(self, window: Window, old: Written, logits: Tensor) -> Written:
        """Rewrite where another token is now likelier than the threshold (LLaDA2.1)."""
        threshold = self.params.editing_threshold
        assert threshold is not None
        best = Drawn(logits, most_probable(logits))
        tokens = best.tokens.tolist()
        is_old = np.array(tokens, dtype=np.int64) == list(old.values())
        is_changed = (probability(best).cpu().numpy() > threshold) & ~is_old
        changed = dict(compress(zip(old, tokens, strict=True), is_changed))
        self._tell(window, changed, best, is_changed)
        if self.params.report_margin:
            window.margin = min(window.margin, editing_margin(best, is_old, threshold))
        window.is_settled = window.post_steps > 0 and not changed
        return changed

    def _tell(self, window: Window, written: Written, drawn: Drawn, is_written: np.ndarray) -> None:
        """Note the log-probabilities of what is written, the rows of `drawn` that it is from."""
        if self.is_told:
            rows = is_written.nonzero()[0].tolist()
            told = logprobs_of(drawn, rows, self.params.logprobs or 0)
            window.logprobs |= zip(written, told, strict=True)


def _change(written: Written, canvas: Tensor) -> Change:
    places, tokens = (
        torch.tensor(list(values), dtype=torch.int64, device=canvas.device)
        for values in (written, written.values())
    )
    return Change(places, tokens)
