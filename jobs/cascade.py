"""The `cascade` console command: one sub-command per stage, each loaded only when it is named."""

import importlib
import sys

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
    "validate": "Serve YAMLs read strictly, before they are deployed",
    "demo": "all of it on one small real corpus",
}


def usage() -> str:
    """The list of stages."""
    rows = "\n".join(f"  {name:<10}{text}" for name, text in STAGES.items())
    return f"usage: cascade STAGE [--config FILE.yaml]... [flags]\n\n{rows}\n\ncascade STAGE --help"


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments to the stage's own `main`."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in STAGES:
        print(f"cascade: no stage {words[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(f"jobs.{words[0]}").main(words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
