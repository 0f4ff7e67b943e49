"""Prints whether kinds of prompts differ in what they need of the teacher: python jobs/needs.py CONFIG (after encode).

Takes minutes: it closes every entry of the teacher on samples of every kind. Writes evaluation/needs.json.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from aptp_ray.artifacts import open_run
from aptp_ray.config import ConfigError
from aptp_ray.data import schema
from aptp_ray.data.encoded import count_rows, read_encoding, read_first
from aptp_ray.tracking import Progress
from cli import errors_on_one_line, finish, load, parser, say


def say_errors(errors_at: dict[str, dict[str, float]]) -> None:
    """One line a budget."""
    for budget, errors in errors_at.items():
        say(f"  at {budget} of the MACs: " + ", ".join(f"{kind} {value:.4f}" for kind, value in errors.items()))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kinds", default="line,color,recolor,count-color,pair-color", help="values of the group column")
    arguments.add_argument("--samples", type=int, default=8, help="of each kind, for importances; even")
    options = arguments.parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        config = load(options)
        run = open_run(config)
        from aptp_ray.core.gates import GatedUNet
        from aptp_ray.core.sizes import water_filling
        from aptp_ray.evaluate.needs import NEEDS, KindSamples, measure_needs
        from aptp_ray.train.draws import decode_encoded, training_columns
        from aptp_ray.train.worker import fast_attention, load_with_costs, noise_schedule, text_states_of

        torch.set_num_threads(os.cpu_count() or 1)
        encoding = read_encoding(run, "encoded", "validation")
        if encoding.mode == "online":
            raise ConfigError("encode.mode=online stores no latents, which this job reads: encode the validation split offline")
        teacher = run.local("teacher")
        text_states = text_states_of(encoding, teacher, torch.device("cpu"))
        columns = [schema.GROUP, *training_columns(encoding)]
        rows = read_first(run, "encoded", "validation", columns=columns, rows=count_rows(run, "encoded", "validation"))
        kinds = {}
        for kind in options.kinds.split(","):
            chosen = np.flatnonzero(rows[schema.GROUP] == kind)[:64]
            if not len(chosen):
                raise ConfigError(f"no validation row is of kind {kind!r}: --kinds takes {sorted(set(rows[schema.GROUP]))}")
            part = decode_encoded({name: rows[name][chosen] for name in columns[1:]}, encoding, text_states)
            kinds[kind] = KindSamples(torch.from_numpy(part["mean"]), part["text_states"])
        unet, macs = load_with_costs(teacher, encoding, config.router.depth)
        gated = GatedUNet(fast_attention(unet, torch.device("cpu")).eval(), macs.space)
        bars: dict[str, Progress] = {}

        def progress(kind: str, done: int, total: int) -> None:
            bars.setdefault(kind, Progress(kind, total, unit="rows")).update(done)

        needs = measure_needs(
            gated,
            macs,
            kinds,
            alphas_cumprod=noise_schedule(teacher).alphas_cumprod,
            importance_samples=options.samples,
            again=config.prune.importances_at,
            progress=progress,
        )
        counts = {kind: int((rows[schema.GROUP] == kind).sum()) for kind in kinds}
        shares = {kind: count / sum(counts.values()) for kind, count in counts.items()}
        errors = {float(budget): found for budget, found in needs["error"].items()}
        needs["water_filling"] = {str(at): water_filling(errors, shares, at) for at in (0.65, 0.5)}
        run.write_json(needs, *NEEDS)
    say("rank correlation of importances between kinds (within a kind, between its halves):")
    for pair, value in needs["between"].items():
        a, b = pair.split(" | ")
        say(f"  {a:>12} | {b:<12} {value:.3f}   ({a} {needs['within'][a]:.3f}, {b} {needs['within'][b]:.3f})")
    say("teacher-match error of one static code, by kind:")
    if "error_once" in needs:
        say_errors(needs["error_once"])
        say("the same, its entries judged anew on the way down:")
    say_errors(needs["error"])
    say("an expert for each kind, as large as evens out what a MAC buys, against all of one size:")
    for budget, found in needs["water_filling"].items():
        sizes = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in found["ratios"].items())
        say(f"  at {budget}: {sizes}; error {found['unequal']:.5f} in place of {found['equal']:.5f}")
    finish({"run_dir": run.uri, "stage": "needs", "seconds": round(time.monotonic() - begun, 1), **needs})


if __name__ == "__main__":
    main()
