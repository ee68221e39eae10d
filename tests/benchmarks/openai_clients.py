"""The cases of `tests/jobs/client_cases.py` with several versions of OpenAI's client, against a
real `cascade serve`: `python -m tests.benchmarks.openai_clients PYTHON...`, one for each version.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.serve_client import KEY
from tests.benchmarks.serve_runs import write_model
from tests.benchmarks.served import cascade_serve

CASES = Path(__file__).parents[1] / "jobs" / "client_cases.py"


def main(pythons: list[str]) -> int:
    """Run all; the exit code is 1 where a version failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", max_sequence_length=256)
        with cascade_serve(model, Path(folder) / "log") as server:
            for python in pythons:
                done = subprocess.run([python, str(CASES), server.url, KEY, "served"], check=False)
                failed += done.returncode != 0
                if done.returncode:
                    print(f"{python}: FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
