"""`import lrpfunc` takes at most 1.15 times as long as `import torch`.

Starts processes that do nothing else, in turn, and prints the ratio of their times with its spread. Run as
`python -m benchmarks.imports [--rounds N]`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    """How long a process takes that does nothing but that."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    statements = "import torch", "import lrpfunc"
    for statement in statements:  # reads the files from disk, and writes their bytecode
        seconds(statement)
    times = [[seconds(statement) for statement in statements] for _ in range(rounds)]
    ratios = [lrpfunc / torch for torch, lrpfunc in times]
    low, median, high = statistics.quantiles(ratios, n=4)
    for statement, taken in zip(statements, zip(*times, strict=True), strict=True):
        print(f"{statement:16} {statistics.median(taken):6.2f} s   fastest {min(taken):.2f} s")
    fastest = min(lrpfunc for _, lrpfunc in times) / min(torch for torch, _ in times)
    print(f"ratio of {rounds} pairs: {median:.2f} x ({low:.2f} to {high:.2f}), of the fastest {fastest:.2f} x")


if __name__ == "__main__":
    main()
