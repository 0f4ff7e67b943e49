"""Measures one room of the house against a baseline in the same run, and prints the ratios as its last line (JSON).

    python jobs/benchmark.py data      encoding against the bare encoders, reading against training, memory, faults
    python jobs/benchmark.py train     steps against their floors, workers, checkpoints, encoders inside the step
    python jobs/benchmark.py serve     HTTP against the engine, experts against the teacher, batching, latencies [--run-dir URI]
    python jobs/benchmark.py switches  the prune stage's departures from the reference, each taken back on the demo
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module

from cli import errors_on_one_line, finish, say

TOPICS = ("data", "train", "serve", "switches")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("topic", choices=TOPICS)
    arguments.add_argument("--run-dir", help="serve: a finished run of the demo, in place of experts cut for the occasion")
    options = arguments.parse_args()
    if options.run_dir and options.topic != "serve":
        arguments.error("--run-dir is for the topic serve")
    given = {"run_dir": options.run_dir} if options.run_dir else {}
    begun = time.monotonic()
    with errors_on_one_line():
        figures = import_module(f"benchmarks.{options.topic}").measure(say, **given)
    finish({"stage": f"benchmark {options.topic}", "seconds": round(time.monotonic() - begun, 1), **figures})


if __name__ == "__main__":
    main()
