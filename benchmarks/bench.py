"""All benchmarks, and what they say of every measure that has a reach.

    python benchmarks/bench.py [--quick] [--device cuda --dtype bfloat16]     (make bench is --quick)

Each runs in a process of its own, one after the other: leave the machine alone meanwhile. Results go to a
folder for each device and dtype in benchmarks/results, those of --quick to benchmarks/results/quick.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import RESULTS, Claim, claims_table

SCRIPTS = ["step", "memory", "inference", "mixed_batch", "wrapping", "growth", "forms", "precision", "peers"]


def main() -> None:
    options = sys.argv[1:]
    here = Path(__file__).parent
    claims, failed, folder = [], [], RESULTS
    for script in SCRIPTS:
        print(f"\n## {script}\n", flush=True)
        command = [sys.executable, str(here / f"{script}.py"), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        if process.wait():
            failed.append(script)
        else:
            folder = Path(last).parent
            claims += [Claim(**claim) for claim in json.loads(Path(last).read_text())["claims"]]
    table = claims_table(claims)
    print(f"\n## All measures\n\n{table}")
    (folder / "measures.md").write_text(f"    python benchmarks/bench.py {' '.join(options)}\n\n{table}\n")
    if failed:
        raise SystemExit(f"These did not run: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
