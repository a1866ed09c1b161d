"""Runs all benchmarks, and reports every measure that has a target.

    python benchmarks/bench.py [--quick] [--device cuda --dtype bfloat16]     (make bench is --quick)
    python benchmarks/bench.py --report [...]     writes the tables again from existing results

Scripts run one after the other, each in its own process. Run nothing else at the same time. Results go to one folder
per device and dtype in benchmarks/results, or in benchmarks/results/quick with --quick. Its README.md contains all
tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from harness import Claim, Options, claims_table, markdown_table, parse_options, results_folder

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


def run_script(script: str, options: list[str]) -> bool:
    """Runs a script and shows its output. Returns whether it succeeded."""
    return subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options]).returncode == 0


def command_of(result: dict[str, Any]) -> str:
    """The command that produced a result, from its saved options."""
    flags = []
    for option in fields(Options):
        value = result["options"][option.name]
        if value != option.default:
            flags += [f"--{option.name}", *([] if value is True else [str(value)])]
    return " ".join(["python", f"benchmarks/{result['name']}.py", *flags])


def report(results: list[dict[str, Any]], folder: Path) -> str:
    """All results as Markdown, each below the command that produced it."""
    claims = [Claim(**claim) for result in results for claim in result["claims"]]
    parts = [
        "# What the benchmarks have measured",
        "`benchmarks/bench.py` has written this file: change nothing here by hand.",
        claims_table(claims),
    ]
    for result in results:
        parts += [
            f"## {result['name']}",
            f"    {command_of(result)}",
            result["machine"],
        ]
        for table in result["tables"]:
            parts += [f"{table['caption']}:", markdown_table(table["columns"], table["rows"])]
        if (folder / f"{result['name']}.png").is_file():
            parts.append(f"![{result['name']}]({result['name']}.png)")
    return "\n\n".join(parts) + "\n"


def found_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the order of the scripts."""
    paths = [folder / f"{script}.json" for script in SCRIPTS]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def main() -> None:
    options = sys.argv[1:]
    if {"-h", "--help"} & set(options):
        sys.exit(__doc__)
    only_report = "--report" in options
    options = [option for option in options if option != "--report"]
    folder = results_folder(parse_options(options))
    failed = []
    for script in [] if only_report else SCRIPTS:
        print(f"\n## {script}\n", flush=True)
        if not run_script(script, options):
            failed.append(script)
    results = [result for result in found_results(folder) if result["name"] not in failed]
    if results:
        (folder / "README.md").write_text(report(results, folder))
        claims = [Claim(**claim) for result in results for claim in result["claims"]]
        print(f"\n## All measures\n\n{claims_table(claims)}\n\n{folder / 'README.md'}")
    if failed:
        sys.exit(f"These did not run: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
