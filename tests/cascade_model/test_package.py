"""The folder's README tells the truth."""

import re
import subprocess
import sys
from pathlib import Path

import cascade_model

FOLDER = Path(cascade_model.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
)


def rows() -> list[list[str]]:
    """Modules of each row of the table."""
    cells = re.findall(r"^\| (`[^|]+`) \|", README, flags=re.MULTILINE)
    return [re.findall(r"`(\w+)`", cell) for cell in cells]


def loads_torch(names: list[str]) -> bool:
    imports = "; ".join(f"import cascade_model.{name}" for name in names)
    program = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", program], cwd=FOLDER.parent).returncode == 1


def test_the_rows_that_load_no_torch_are_as_many_as_it_says():
    said = re.search(r"The first (\w+) rows, up to `(\w+)`, load no torch", README)
    assert said is not None
    count = NUMBERS.index(said[1])
    light = [name for row in rows()[:count] for name in row]
    assert light[-1] == said[2]
    assert not loads_torch(light)
    assert loads_torch([*light, *rows()[count]])  # the control, and no row too few


def test_what_the_table_names_is_there_and_named_once():
    named = [name for row in rows() for name in row]
    assert len(named) == len(set(named)) > 20
    there = {path.stem for path in FOLDER.iterdir()}
    assert set(named) <= there
