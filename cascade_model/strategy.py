"""The general denoising strategy: what the requests of this project are decoded by.

It composes a schedule, a rule and the options of `SamplingParams`. Published samplers with laws of
their own are strategies too (`presets`).
"""

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.config import ModelConfig
from cascade_model.drawing import draw_tokens, position_noise, uniforms
from cascade_model.model import never_emitted
from cascade_model.noise import POSITION
from cascade_model.passes import Prediction
from cascade_model.sampling import SamplingParams
from cascade_model.schedules import masks_left
from cascade_model.unmasking import RULES, choose, probability


class General:
    """One request's strategy; keeps no state but the window's."""

    def __init__(
        self, config: ModelConfig, params: SamplingParams, is_given: Tensor, choice: int = 0
    ) -> None:
        self.config, self.params, self.choice, self.is_given = config, params, choice, is_given
        banned = never_emitted(config)
        ends = [i for i in config.end_ids if params.suppress_eos == "token"]
        self._banned = torch.tensor(sorted({*banned, *ends}), device=is_given.device)
        self._ends = torch.tensor(config.end_ids, device=is_given.device)
        self.end_ids = params.end_ids(config)
        self._stops = torch.tensor(self.end_ids, dtype=torch.int64, device=is_given.device)

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether all places that will be kept are filled, or all up to a token that ends it."""
        kept = canvas[window.start : window.keep]
        open_places = (kept == self.config.mask_id).nonzero()
        if len(open_places):
            return self.has_end(window, canvas, window.start + int(open_places[0]))
        if self.params.editing_threshold is None or window.is_spent:
            return True
        return window.is_settled or window.post_steps >= self.params.max_post_steps

    def has_end(self, window: Window, canvas: Tensor, until: int) -> bool:
        """Whether a token that ends the completion was written before a place of the window."""
        part = slice(window.start, until)
        new = canvas[part][~self.is_given[part]]
        return bool(self.end_ids) and bool(torch.isin(new, self._stops).any())

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The places to predict: the masked ones, and the written ones where they may change."""
        block = slice(window.start, window.end)
        wanted = canvas[block] == self.config.mask_id
        if self._revises(window):
            wanted = wanted | ~self.is_given[block]
        return window.start + wanted.nonzero()[:, 0]

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """What a step writes, from the predictions it asked for."""
        places = prediction.places
        logits = prediction.logits.index_fill(-1, self._banned, float("-inf"))
        is_masked = canvas[places] == self.config.mask_id
        changes = [self._unmask(window, canvas, places[is_masked], logits[is_masked])]
        if self._revises(window):
            old, seen = places[~is_masked], logits[~is_masked]
            revise = self._edit if self.params.editing_threshold is not None else self._remask
            changes.append(revise(window, old, canvas[old], seen))
        return Change(
            torch.cat([change.places for change in changes]),
            torch.cat([change.tokens for change in changes]),
        )

    def _unmask(self, window: Window, canvas: Tensor, places: Tensor, logits: Tensor) -> Change:
        if len(places) == 0:
            window.post_steps += 1
            return Change(places, places)
        params, inside = self.params, (places - window.start).tolist()
        key = (self.choice, window.number, window.step, inside)
        tokens = draw_tokens(logits, params, *key)
        scores = self._scores(logits, tokens, key)
        order = scores
        if params.position_temperature > 0:
            noise = torch.from_numpy(position_noise(params.seed, *key)).to(scores.device)
            is_log = RULES[params.rule].is_log
            weights = scores.double() if is_log else scores.double().clamp(min=1e-30).log()
            order = weights + params.position_temperature * noise
        if params.suppress_eos == "confidence":
            order = order.masked_fill(torch.isin(tokens, self._ends), float("-inf"))
            scores = torch.where(order.isneginf(), order.to(scores.dtype), scores)
        masks = int((canvas[window.start : window.end] == self.config.mask_id).sum())
        least, most = self._bounds(window, masks)
        taken = choose(scores, order, least, most, params)
        return Change(places[taken], tokens[taken])

    def _scores(self, logits: Tensor, tokens: Tensor, key: tuple) -> Tensor:
        score = RULES[self.params.rule].score
        if score is not None:
            return score(logits, tokens)
        return torch.from_numpy(uniforms(POSITION, self.params.seed, *key)).to(logits.device)

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

    def _remask(self, window: Window, places: Tensor, old: Tensor, logits: Tensor) -> Change:
        """Mask again what has lost confidence; each place once, so that a window ends."""
        if window.revised is None:
            window.revised = torch.zeros(
                window.end - window.start, dtype=torch.bool, device=places.device
            )
        threshold = self.params.remask_threshold
        assert threshold is not None
        doubted = probability(logits, old) < threshold
        doubted &= ~window.revised[places - window.start]
        window.revised[places[doubted] - window.start] = True
        return Change(places[doubted], torch.full_like(places[doubted], self.config.mask_id))

    def _edit(self, window: Window, places: Tensor, old: Tensor, logits: Tensor) -> Change:
        """Rewrite where another token is now likelier than the threshold (LLaDA2.1)."""
        best, threshold = logits.argmax(dim=-1), self.params.editing_threshold
        assert threshold is not None
        is_better = probability(logits, best) > threshold
        changed = is_better & (best != old)
        window.is_settled = window.post_steps > 0 and not bool(changed.any())
        return Change(places[changed], best[changed])
