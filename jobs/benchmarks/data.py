"""The data plane, measured: encoding against the bare encoders, reading against the UNet's appetite, memory, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, load_config, parse_config
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import Feed
from benchmarks.faults import FAULTS, SIDE, color_of, write_shard
from cli import DEMO_CONFIG, ray_session
from rows import encode_rows, encoder_spec, framing, layout_of, reader_of

_FEW, _MANY = 1000, 4000  # images of two encodings: the difference is free of start-up
_WINDOW = 512  # rows that the reader permutes together in the memory test
_BATCH = 32  # of the demo's training


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Runs all parts; returns the ratios that the benchmark's last line holds, and what they are made of."""
    with tempfile.TemporaryDirectory() as folder:
        images = [f"data.source.train_images={_MANY}", f"data.source.validation_images={_FEW}"]
        config = load_config(DEMO_CONFIG, [f"run_dir={folder}/run", *images, "tracking.mode=disabled"])
        run = open_run(config)
        run.prepare(config)
        from aptp_ray.train.teacher import import_teacher

        import_teacher(config, run)
        with ray_session(config):
            figures = encoding(config, run, say)
            figures |= faults(config, Path(folder), say)
        figures |= reading(config, run, say)
        figures |= memory(run, Path(folder), say)
    return figures


# -- encoding ------------------------------------------------------------------------------------------------------------


def encoding(config: Config, run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows a second of the encode stage, without its start-up, against the same encoders in a plain loop."""
    for split in ("train", "validation"):
        layout_of(config, run, split)  # draws the shards
    seconds = {}
    for split in ("validation", "train"):
        begun = time.monotonic()
        encode_rows(config, run, split, ("encoded", split), run.address("teacher"))
        seconds[split] = time.monotonic() - begun
    rate = (_MANY - _FEW) / (seconds["train"] - seconds["validation"])
    start_up = seconds["train"] - _MANY / rate
    bare = bare_rate(config, run)
    say(f"encode: {rate:.1f} rows/s after {start_up:.1f} s of start-up; the bare encoders in a loop: {bare:.1f} rows/s")
    return {
        "encode_vs_bare": round(rate / bare, 3),
        "encode_rows_per_s": round(rate, 1),
        "bare_rows_per_s": round(bare, 1),
        "encode_start_up_s": round(start_up, 1),
    }


def bare_rate(config: Config, run: RunDir, rows: int = 1280) -> float:
    """Rows a second of the encoders in this process, with all cores, on images that are in memory and cropped."""
    from dataclasses import replace

    from aptp_ray.data.encoder import Encoder
    from aptp_ray.data.rows import cropped_table, framed

    layout, frame = layout_of(config, run, "train"), framing(config)
    samples = list(islice((row for unit in layout.units() for row in layout.read(unit)), rows))
    size = config.encode.batch_size
    squares = [square for row in samples for square in framed(row, frame)]
    batches = [cropped_table(squares[begin : begin + size]) for begin in range(0, rows, size)]
    encoder = Encoder(replace(encoder_spec(config, run.address("teacher")), threads=os.cpu_count() or 1))
    encoder(batches[0])
    begun = time.monotonic()
    for batch in batches[1:]:
        encoder(batch)
    return sum(batch.num_rows for batch in batches[1:]) / (time.monotonic() - begun)


# -- faults --------------------------------------------------------------------------------------------------------------


def faults(config: Config, folder: Path, say: Callable[[str], None], rows: int = 10_000, bad: int = 500) -> dict[str, Any]:
    """One shard of 10,000 rows, 500 of them faulty: what comes out, and whether each caption has its own image."""
    import pyarrow.parquet as pq

    (folder / "faulty").mkdir()
    planted = write_shard(folder / "faulty/00000.tar", rows, bad)
    source = {"kind": "webdataset", "train": f"{folder}/faulty/*.tar", "validation": f"{folder}/faulty/*.tar"}
    tree = config.model_dump(mode="json")
    tree["data"] |= {"source": source, "resolution": SIDE}
    # The prompt encoder alone: what is counted does not depend on the VAE.
    tree["encode"] |= {"mode": "online"}
    other = parse_config(tree | {"run_dir": f"{folder}/faulty_run"})
    run = open_run(other)
    begun = time.monotonic()
    facts = encode_rows(other, run, "train", ("encoded", "train"), config.run_dir + "/teacher")
    rejected = pq.read_table(f"{folder}/faulty_run/encoded/rejected.parquet").to_pylist()
    reasons: dict[str, int] = {}
    for row in rejected:
        reason = row["reason"].split(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    say(f"faults: {facts['rows_in']} rows in, {facts['rows']} out, {len(rejected)} rejected in {time.monotonic() - begun:.0f} s")
    for reason, count in sorted(reasons.items()):
        say(f"  {count:4d}  {reason}")
    assert set(planted) == set(FAULTS)
    layout = layout_of(other, run, "train")
    good = [row for unit in layout.units() for row in layout.read(unit) if not row["reason"]]
    return {
        "faulty_rows_in": facts["rows_in"],
        "faulty_rows_out": facts["rows"],
        "faulty_rows_rejected": len(rejected),
        "faulty_rows_misplaced": sum(misplaced(row) for row in good),
    }


def misplaced(row: dict[str, Any]) -> bool:
    """Whether a row's image is not in the color that its caption's number stands for (gray ones: in its brightness)."""
    number = int(row["caption"].rsplit(" ", 1)[1])
    middle = row["image"][row["image"].shape[0] // 2, row["image"].shape[1] // 2].astype(int)
    expected = np.array(color_of(number))
    if len(set(middle.tolist())) == 1:  # Pillow's weights of the eye's sensitivity, ITU-R 601
        expected = np.full(3, expected @ np.array([0.299, 0.587, 0.114]))
    return bool(np.abs(middle - expected).max() > 40)  # a palette of 256 colors is that coarse


# -- reading -------------------------------------------------------------------------------------------------------------


def make_feed(config: Config, run: RunDir, window: int, parts: tuple[str, ...] = ("encoded", "train")) -> Any:
    """Returns the feed of a lone worker over encoded rows, and what the rows are made of."""
    from aptp_ray.data.encoded import read_encoding

    made_of = read_encoding(run, "encoded", "train")
    loop = config.finetune.apart
    feed = Feed(
        reader_of(config, run, *parts),
        global_batch_size=_BATCH,
        rank=0,
        world_size=1,
        seed=0,
        window=window,
        lanes=loop.num_lanes(),
        decode=lambda rows: decode_encoded(rows, made_of),
    )
    return feed, made_of


def reading(config: Config, run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows a second of the training reader, tensors ready, against what the bare UNet's training step consumes."""
    feed, made_of = make_feed(config, run, config.finetune.apart.shuffle_window)
    batches = feed.batches(0)
    next(batches)
    begun, count = time.monotonic(), 2 * _MANY // _BATCH
    for _ in range(count):
        rows = next(batches)
    read = count * _BATCH / (time.monotonic() - begun)
    step = step_rate(config, run, made_of, rows)
    say(f"reader: {read:.0f} rows/s; the UNet's training step: {step:.1f} rows/s")
    return {
        "reader_vs_step": round(read / step, 1),
        "reader_rows_per_s": round(read),
        "step_rows_per_s": round(step, 1),
    }


def step_rate(config: Config, run: RunDir, made_of: Any, rows: Any, steps: int = 8) -> float:
    """Rows a second of the cheapest step there is: one denoising step of the UNet alone, on all cores."""
    import torch
    from diffusers import UNet2DConditionModel

    from aptp_ray.core.finetune_objective import FinetuneObjective
    from aptp_ray.train.worker import fast_attention, noise_schedule

    torch.set_num_threads(os.cpu_count() or 1)
    folder = run.local("teacher")
    unet = fast_attention(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"), torch.device("cpu")).train()
    schedule = noise_schedule(folder)
    objective = FinetuneObjective(
        unet, None, alphas_cumprod=schedule.alphas_cumprod, prediction_type=schedule.prediction_type, gamma=None
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    draws = Draws(0, "benchmark", _BATCH, made_of, len(schedule.alphas_cumprod))
    best = float("inf")
    for step in range(steps):
        begun = time.monotonic()
        inputs = draws(rows, step, slice(0, _BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = objective(**inputs)
        optimizer.zero_grad()
        losses["denoising"].backward()
        optimizer.step()
        best = min(best, time.monotonic() - begun)
    return _BATCH / best


# -- memory --------------------------------------------------------------------------------------------------------------


def memory(run: RunDir, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory of a process that reads two epochs, at 2,000 rows and at 20,000 (the same files under more names)."""
    peaks = {}
    for rows in (2_000, 20_000):
        name = f"rows_{rows}"
        multiply(run, name, rows)
        done = subprocess.run(
            [sys.executable, __file__, run.uri, name], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | _PATHS
        )
        peaks[rows] = json.loads(done.stdout.splitlines()[-1])
        say(f"reader over {rows} rows: {peaks[rows]['peak_mb']:.0f} MB at its peak, {peaks[rows]['own_mb']:.0f} MB its own")
    few, many = peaks[2_000], peaks[20_000]
    return {
        "reader_memory_growth": round(many["peak_mb"] / few["peak_mb"] - 1, 4),
        "reader_memory_mb": {str(rows): value for rows, value in peaks.items()},
    }


_PATHS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])}


def multiply(run: RunDir, name: str, rows: int) -> None:
    """Makes a folder of encoded rows of the wanted size out of the files at hand."""
    source, target = Path(run.path("encoded", "train")), Path(run.path("encoded", name))
    index = json.loads((source / "index.json").read_text())["files"]
    target.mkdir()
    files: list[list[Any]] = []
    while sum(count for _, count in files) < rows:
        old, count = index[len(files) % len(index)]
        new = f"part-{len(files):06d}-000000.parquet"
        os.link(source / old, target / new)
        files.append([new, count])
    (target / "index.json").write_text(json.dumps({"files": files}))
    made_of = run.read_json("encoded", "encoding.json")
    made_of["splits"][name] = {"rows": sum(count for _, count in files)}
    run.write_json(made_of, "encoded", "encoding.json")


def peak(uri: str, name: str) -> dict[str, float]:
    """Reads two epochs and returns this process's peak memory, and how much of it came with the reading."""
    config = load_config(DEMO_CONFIG, [f"run_dir={uri}"])
    run = open_run(config)
    feed, _ = make_feed(config, run, _WINDOW, ("encoded", name))
    before = most_memory()
    rows = json.loads(run.read_bytes("encoded", name, "index.json"))["files"]
    batches = feed.batches(0)
    for _ in range(2 * sum(count for _, count in rows) // _BATCH):
        next(batches)
    after = most_memory()
    return {"peak_mb": round(after, 1), "own_mb": round(after - before, 1)}


def most_memory() -> float:
    """This process's peak so far, in MB. (getrusage's would begin with that of the process that started this one.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(peak(*sys.argv[1:])))
