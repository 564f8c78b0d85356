"""Every law of every method on every family: the whole product, which the quick tests only sample.

    python experiments/laws.py

writes `experiments/results/laws.md`. Expected: no failure. It takes about an hour on two cores; arguments go to pytest,
so that `-k "law_1 or law_2 or law_5 or law_6"` leaves out what trains.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "experiments/results/laws.md"
FILES = ("tests/test_methods.py", "tests/test_quantize.py")


def run(report: Path, *extra: str) -> None:
    """Runs the product; pytest's exit status is read off the report."""
    command = [sys.executable, "-m", "pytest", *FILES, "-m", "slow or not slow", "-q", f"--junitxml={report}", *extra]
    subprocess.run(command, cwd=ROOT, check=False)


def table(report: Path) -> str:
    """The report in Markdown: a line a row of the laws' table, a column a family, passed of all in each cell."""
    passed, of, failures, laws = Counter(), Counter(), [], {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        cell = _cell(case.get("classname", ""), case.get("name", ""))
        if cell is None or case.find("skipped") is not None:
            continue
        bad = case.find("failure") is not None or case.find("error") is not None
        laws[case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")] = None
        of[cell] += 1
        passed[cell] += not bad
        failures += [case.get("name")] if bad else []
    columns = list(dict.fromkeys(column for _, column in sorted(of, key=lambda c: ("quantised" in c[1], c[1]))))
    lines = [f"| row | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in sorted({row for row, _ in of}):
        cells = [f"{passed[row, c]} of {of[row, c]}" if of[row, c] else "-" for c in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "optax", "transformers"))
    facts = f"{sum(passed.values())} of {sum(of.values())} passed. {versions}, Python {sys.version.split()[0]}, CPU."
    said = (
        f"Tests passed of those run, by row and family: {'; '.join(laws)}. Rows that train entries of the base itself "
        "have no quantised cell."
    )
    missed = "\n".join(f"- failed: `{name}`" for name in failures)
    title = "# The laws, for every row of the table of methods and every family"
    return "\n\n".join(filter(None, [title, said, facts, missed, "\n".join(lines)])) + "\n"


def _cell(where: str, name: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"test_\w+\[(.*)\]", name)
    if match is None:
        return None
    if "test_quantize" in where:
        found = re.fullmatch(r"(.+)-(\w+)-(int8|nf4|nf4-double)", match[1])
        if found is None or not name.startswith("test_the_laws"):
            return None
        return found[1], f"{found[2]}, quantised to {found[3]}"
    found = re.fullmatch(r"([a-z0-9_]+)-(.+)", match[1])
    return (found[2], found[1]) if found and "law_10" not in name else None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "laws.xml"
        run(file, *sys.argv[1:])
        OUT.write_text(table(file))
    print(OUT.read_text())
