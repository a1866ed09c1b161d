"""Ten minutes of what people and machines do to a run, a cache and an adapter; figures at the end.

make soak                      # or: python -m soak --seconds 600 --seed 0
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

from soak import flips, kills, sequences, threads

# Of the whole time, what each part takes.
SHARES = {kills: 0.5, flips: 0.15, sequences: 0.2, threads: 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long it may take")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    options = parser.parse_args()
    torch.set_num_threads(1)  # kills forks, which a pool of threads would not survive
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    outcomes = []
    for part, share in SHARES.items():
        found = part.run(share * options.seconds, options.seed)
        outcomes += found if isinstance(found, list) else [found]
        print(f"{part.__name__} done", file=sys.stderr)
    for outcome in outcomes:
        print(outcome.line())
        print(*(f"    {failure}" for failure in outcome.failures[:10]), sep="\n", end="\n" if outcome.failures else "")
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
