"""Which documents are kept from training: a function of the text alone."""

import hashlib


def text_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out(text: str, held_out_rate: float) -> bool:
    """Whether a document is kept from training; equal texts always go the same way."""
    return text_hash(text) < held_out_rate
