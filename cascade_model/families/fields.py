"""A published config.json read field by field, so that none that matters is passed over.

A reader takes the fields it understands and names the ones that change no number. A field that is
left over is refused, unless its value says "nothing" (null, false, 0, empty): better one question
too many than wrong logits without an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cascade_model.errors import CheckpointMismatch, InputError

# Fields of any config that change no logit of a trained network: bookkeeping, initial values,
# dropout, auxiliary losses, kernels, token ids (read elsewhere) and defaults of generation.
_INERT = {
    "architectures", "attention_dropout", "attn_implementation", "attn_pdrop", "auto_map",
    "bos_token_id", "cascade_decoding", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "label2id", "length_penalty", "mask_token_id", "max_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_dropout", "output_hidden_states",
    "output_past", "output_router_logits", "pad_token_id", "predict_special_tokens", "prefix",
    "problem_type", "repetition_penalty", "resid_pdrop", "residual_dropout", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache",
}  # fmt: skip
_NOTHING = (None, False, "", [], {})  # 0 equals False


class Fields:
    """The fields of one config.json, and which of them were understood."""

    def __init__(
        self, values: Mapping[str, Any], where: str, family: str, ignore: Sequence[str] = ()
    ) -> None:
        self.values, self.where, self.family = values, where, family
        self._known = {*_INERT, *ignore}

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; null counts as missing."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0; null counts as missing."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null counts as missing."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true, false")
        return value

    def optional(self, name: str) -> Any:
        """Any value, none where the field is missing."""
        self._known.add(name)
        return self.values.get(name)

    def only(self, name: str, *readable: Any) -> None:
        """Refuse a value that is not among the readable ones; a missing field is fine."""
        self._known.add(name)
        if name in self.values and self.values[name] not in readable:
            self.refuse(name, ", ".join(map(str, readable)))

    def exactly(self, name: str, value: Any) -> None:
        """Refuse another value, and a missing field: the published default is another network."""
        self._known.add(name)
        if self.values.get(name) != value:
            self.refuse(name, str(value))

    def inert(self, *names: str) -> None:
        """Fields of this family that change no logit."""
        self._known.update(names)

    def rope_theta(self, default: float = 10000.0) -> float:
        """The base of rotary positions, in the old place (top level) or the new
        (`rope_parameters`); any scaling of positions is refused."""
        self._known.update(("rope_theta", "rope_scaling", "rope_parameters"))
        rope = {"rope_theta": self.values.get("rope_theta") or default}
        for place in ("rope_scaling", "rope_parameters"):
            nested = self.values.get(place) or {}
            kind = nested.get("rope_type") or nested.get("type") or "default"
            if kind != "default":
                self.refuse("rope_type", "default", kind)
            rope |= {key: value for key, value in nested.items() if value is not None}
        surplus = sorted(set(rope) - {"rope_theta", "rope_type", "type"})
        if surplus:
            self.refuse(f"rope_parameters.{surplus[0]}", "none", rope[surplus[0]])
        return float(rope["rope_theta"])

    def no_window(self) -> None:
        """Refuse attention that sees only a window; a width that is switched off is fine."""
        self.only("use_sliding_window", False, None)
        self.inert("max_window_layers", "sliding_window")
        kinds = self.optional("layer_types") or []
        other = [kind for kind in kinds if kind != "full_attention"]
        if other:
            self.refuse("layer_types", "full_attention", other[0])

    def refuse(self, name: str, readable: str, value: Any = ...) -> NoReturn:
        """Raise `InputError` for a value, naming those that can be read."""
        shown = self.values.get(name) if value is ... else value
        raise InputError(
            f"source={self.where} has {name}={_short(shown)}; only {readable} can be read for the "
            f"family {self.family}, choose such a checkpoint"
        )

    def require_all_known(self) -> None:
        """Refuse the fields that nobody took."""
        for name in sorted(set(self.values) - self._known):
            if self.values[name] not in _NOTHING and not name.startswith("_"):  # _: bookkeeping
                raise InputError(
                    f"source={self.where} has the setting {name}={_short(self.values[name])}, "
                    f"which is not known for the family {self.family}; choose another checkpoint, "
                    f"or pass --ignore-settings {name} if it does not change the numbers"
                )

    def _take(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointMismatch(
                f"source={self.where} has no {name} in its config.json, which the family "
                f"{self.family} needs; copy the checkpoint's own config.json"
            )
        return value


def _short(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
