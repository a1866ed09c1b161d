"""All benchmarks, and what they say of every measure that has a reach.

    python benchmarks/bench.py [--quick] [--device cuda --dtype bfloat16]     (make bench is --quick)

Each runs in a process of its own, one after the other: leave the machine alone meanwhile. Results go to a folder for
each device and dtype in benchmarks/results, those of --quick to benchmarks/results/quick; its README.md holds all
tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import Claim, claims_table, markdown_table

HERE = Path(__file__).parent
SCRIPTS = [
    "step",
    "memory",
    "inference",
    "mixed_batch",
    "wrapping",
    "growth",
    "forms",
    "precision",
    "peers",
    "where_time_goes",
]


def run_script(script: str, options: list[str]) -> Path | None:
    """Runs one, passing on what it prints, and returns the file of its result; None if it failed."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"{script}.py"), *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return None if process.wait() else Path(last)


def report(results: list[dict[str, Any]], options: list[str], folder: Path) -> str:
    """All results as Markdown, each under the command that made it."""
    claims = [Claim(**claim) for result in results for claim in result["claims"]]
    parts = [
        "# What the benchmarks have measured",
        "`benchmarks/bench.py` has written this file: change nothing here by hand.",
        claims_table(claims),
    ]
    for result in results:
        parts += [
            f"## {result['name']}",
            f"    python benchmarks/{' '.join([result['name'] + '.py', *options])}",
            result["machine"],
        ]
        for table in result["tables"]:
            parts += [f"{table['caption']}:", markdown_table(table["columns"], table["rows"])]
        if (folder / f"{result['name']}.png").is_file():
            parts.append(f"![{result['name']}]({result['name']}.png)")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = sys.argv[1:]
    if {"-h", "--help"} & set(options):
        sys.exit(__doc__)
    results, failed = [], []
    for script in SCRIPTS:
        print(f"\n## {script}\n", flush=True)
        path = run_script(script, options)
        if path is None:
            failed.append(script)
        else:
            results.append(json.loads(path.read_text()))
            folder = path.parent
    if results:
        (folder / "README.md").write_text(report(results, options, folder))
        claims = [Claim(**claim) for result in results for claim in result["claims"]]
        print(f"\n## All measures\n\n{claims_table(claims)}\n\n{folder / 'README.md'}")
    if failed:
        sys.exit(f"These did not run: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
