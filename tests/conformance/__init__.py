"""The golden cases of published systems, run against this project's code.

`python -m tests.conformance DIR [--only F] [--skip F]` runs every case of every system folder
below DIR; `tests/data/conformance/README.md` says what a case holds. Reading order: `cases` reads
them, `checkpoints` loads their weights, `forward`, `losses` and `samplers` compute what each kind
expects, `verdicts` compares, `running` and `table` put it together.
"""
