"""What an engine did since its start, and who holds what, for metrics and for tests."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Counters:
    """Sums since the start, then the state behind the last round. All are counts."""

    rounds: int = 0
    """Forward passes over many sequences."""
    passes: int = 0
    """Passes of single sequences in them; each chunk of a cut prompt is one."""
    rows: int = 0
    """Tokens that were fed."""
    tokens: int = 0
    """Tokens that were decoded and handed out."""
    prefix_lookups: int = 0
    """Times a sequence of a page or more was let in and somebody could have known its beginning."""
    prefix_hits: int = 0
    """Times somebody did."""
    prefix_tokens: int = 0
    """Tokens whose keys and values were copied instead of computed."""
    preemptions: int = 0
    """Times a sequence gave its pages up for another."""
    running: int = 0
    """Sequences that hold pages."""
    waiting: int = 0
    """Sequences that wait to be let in, for the first time or again."""
    pages_held: int = 0
    """Pages of running sequences."""
    pages_known: int = 0
    """Pages of known prefixes."""
    pages_free: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Decoded tokens per pass of one sequence, prompts included; 0 before the first."""
        return self.tokens / max(self.passes, 1)
