"""`python -m tests.oracle --cases 10000`: draws cases and counts those in which the library and the oracle agree."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from tests.oracle.compare import CASES_A_MODEL, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the case to begin at, to go on where a run was left")
    parser.add_argument("--show", type=int, default=5, help="how many of the cases that do not agree are shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    first, shown, begun = None, 0, time.monotonic()
    for number in range(options.seed // CASES_A_MODEL, -(-(options.seed + options.cases) // CASES_A_MODEL)):
        for outcome in outcomes(number):
            counts[outcome.says] += 1
            if outcome.says in ("disagree", "failed", "refused", "unknown"):
                first = outcome.number if first is None and outcome.says in ("disagree", "failed") else first
                if shown < options.show:
                    shown += 1
                    print(f"--- case {outcome.number}: {outcome.says}: {outcome.detail}", flush=True)
        if number % 25 == 0:
            print(f"{sum(counts.values())} cases in {time.monotonic() - begun:.0f} s: {dict(counts)}", flush=True)
    print(f"{sum(counts.values())} cases: {dict(counts)}; the first that fails: {first}")


if __name__ == "__main__":
    main()
