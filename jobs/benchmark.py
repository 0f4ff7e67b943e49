"""Measures one room of the house against a baseline in the same run, and prints the ratios as its last line (JSON).

    python jobs/benchmark.py data      encoding against the bare encoders, reading against training, memory, faults
    python jobs/benchmark.py train     steps against their floors, workers, checkpoints, encoders inside the step
    python jobs/benchmark.py serve     HTTP against the engine, experts against the teacher, batching, latencies [--run-dir URI]
    python jobs/benchmark.py simulator  jobs/plan.py's simulator against the service [--run-dir URI] [--out FOLDER]
    python jobs/benchmark.py experts   experts' time against their MACs, at Stable Diffusion 2.1's size
    python jobs/benchmark.py formats   an expert compiled, channels last, with eight-bit weights: time and output error
    python jobs/benchmark.py mixture   aptp_ray.MixturePipeline against the engine alone [--run-dir URI]
    python jobs/benchmark.py evaluate  the evaluation's drawing against the bare sampler, and its whole time  --run-dir URI
    python jobs/benchmark.py switches  the prune stage's departures from the reference, each taken back on the demo
                                       [--only NAME,NAME] [--run-dir URI]
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module

from cli import errors_on_one_line, finish, say

TOPICS = ("data", "train", "serve", "simulator", "experts", "formats", "mixture", "evaluate", "switches")
WITH_RUN = ("serve", "simulator", "mixture", "evaluate", "switches")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("topic", choices=TOPICS)
    arguments.add_argument(
        "--run-dir",
        help="a finished demo run; serve, simulator, mixture: in place of experts cut for it; switches: whose teacher and rows "
        "are taken, where its config made the same, and into whose report the variants go (evaluation/tried.json)",
    )
    arguments.add_argument("--only", help="switches: names of variants, with commas between, beside the start; all by default")
    arguments.add_argument("--out", help="simulator: a folder to keep traces, step times and the fleet file in")
    options = arguments.parse_args()
    if options.run_dir and options.topic not in WITH_RUN:
        arguments.error(f"--run-dir is for the topics {', '.join(WITH_RUN)}")
    if options.only and options.topic != "switches":
        arguments.error("--only is for the topic switches")
    if options.out and options.topic != "simulator":
        arguments.error("--out is for the topic simulator")
    given = {name: value for name in ("run_dir", "out", "only") if (value := getattr(options, name))}
    begun = time.monotonic()
    with errors_on_one_line():
        figures = import_module(f"benchmarks.{options.topic}").measure(say, **given)
    finish({"stage": f"benchmark {options.topic}", "seconds": round(time.monotonic() - begun, 1), **figures})


if __name__ == "__main__":
    main()
