"""The `cascade` console command: one sub-command per stage, each loaded only when it is named."""

import importlib
import sys
from collections.abc import Sequence

from cascade_model.nearest import cure
from jobs.ending import ended_by_signals

STAGES = {
    "tokenizer": "corpus -> tokenizer.json",
    "prepare": "corpus -> pre-masked Arrow shards (Ray Data)",
    "shards": "look into a corpus: verify, show, stats, documents, materialise",
    "plan": "a training job's memory, work, time and storage, before it starts",
    "pretrain": "shards -> block-diffusion or autoregressive checkpoint (Ray Train)",
    "convert": "published checkpoint -> model folder, or a block-diffusion start",
    "export": "model folder -> the layout of its published family",
    "teach": "corpus + autoregressive teacher -> its likeliest tokens, for distil (Ray Data)",
    "distil": "student + autoregressive teacher -> checkpoint (Ray Train)",
    "sft": "conversations + model -> a model that answers (Ray Train)",
    "evaluate": "checkpoint -> held-out bound per token and per byte",
    "generate": "prompts -> completions, exactly once (Ray Data)",
    "serve": "checkpoint -> OpenAI-compatible endpoint (Ray Serve)",
    "validate": "Serve, KubeRay and launcher YAMLs read strictly, before they are used",
    "demo": "all of it on one small real corpus",
}


def usage() -> str:
    """The list of stages."""
    rows = "\n".join(f"  {name:<10}{text}" for name, text in STAGES.items())
    return f"usage: cascade STAGE [--config FILE.yaml]... [flags]\n\n{rows}\n\ncascade STAGE --help"


@ended_by_signals
def main(argv: Sequence[str] | None) -> int:
    """Hand the arguments to the stage's own `main`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in STAGES:
        known = cure(words[0], STAGES, cutoff=0.6)
        print(f"cascade: no stage {words[0]!r}; {known}", file=sys.stderr)
        return 2
    return importlib.import_module(f"jobs.{words[0]}").main(words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
