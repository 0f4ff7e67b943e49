"""The training plane, measured: steps against their floors, encoders inside the step, two workers, checkpoints.

Every figure compares the stage's own worker, started by Ray Train as the pipeline starts it, with something leaner. What is
compared takes turns, step by step or run by run, for other tenants of the machine change its speed from minute to minute.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, load_config
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import run_unet
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import first_rows
from aptp_ray.train.finetune import expert_worker
from aptp_ray.train.launch import launch
from aptp_ray.train.passes import autocast
from aptp_ray.train.prune import prune_worker
from aptp_ray.train.worker import Worker, fast_attention, noise_schedule
from benchmarks.sd21 import inline_ratio
from benchmarks.train_turns import between_steps, in_turns
from cli import DEMO_CONFIG, ray_session
from rows import encode_rows, encoder_spec, framing, layout_of, reader_of

STEPS, WINDOW = 60, 20  # of a run, and those at its end that count: what starts up has started up
KEPT_STEPS, KEPT_EVERY, AFTER_KEEPING = 350, 50, 10  # the upload, beside the steps, is over by then
_IMAGES = ["data.source.train_images=1024", "data.source.validation_images=256"]


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Runs all parts; returns the ratios that the benchmark's last line holds, and what they are made of."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(f"{folder}/run")
        run = open_run(config)
        run.prepare(config)
        from aptp_ray.train.teacher import import_teacher

        import_teacher(config, run)
        with ray_session(config):
            for split in ("train", "validation"):
                encode_rows(config, run, split, ("encoded", split), run.address("teacher"))
            figures = prune_step(run, say)
            figures |= two_workers(run, say)
            figures |= finetune_step(run, say)
            figures |= checkpoints(run, say)
    return figures


def configured(run_dir: str, *options: str, workers: int = 1, threads: int = 2, steps: int = STEPS) -> Config:
    """The demo's config, but with as many steps as it takes to measure, and codes that start without importance."""
    loops = [
        f"{name}={value}"
        for loop in ("prune.loop", "finetune.apart")
        for name, value in (
            (f"{loop}.steps", steps),
            (f"{loop}.log_every_steps", WINDOW),
            (f"{loop}.checkpoint_every_steps", 10 * steps),
        )
    ]
    return load_config(
        DEMO_CONFIG,
        [
            f"run_dir={run_dir}",
            *_IMAGES,
            *loops,
            "prune.start=zeros",
            f"finetune.apart.workers={workers}",
            f"compute.workers={workers}",
            f"compute.threads_per_worker={threads}",
            "tracking.mode=offline",
            *options,
        ],
    )


# -- steps against their floors ------------------------------------------------------------------------------------------


def prune_step(run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """The prune stage's step against its UNets' bare passes, and against itself with the encoders inside."""
    config = configured(run.root)
    _, found = launched(prune_and_floor, config, run, "prune")
    batch = config.prune.loop.global_batch_size
    step, bare, inline = (found[name] for name in ("step", "floor", "encoders"))
    say(
        f"prune: {1e3 * step:.0f} ms a step of {batch}, its floor {1e3 * bare:.0f} ms (teacher and masked UNet forward, "
        f"backward to the masks); encoders in fp32 would add {1e3 * inline:.0f} ms"
    )
    ratio, made_of = inline_ratio()
    say(f"the same for SD 2.1, from MACs: {ratio:.2f} ({made_of})")
    return {
        "prune_vs_floor": round(step / bare, 3),
        "prune_vs_inline_encoding": round((step + inline) / step, 3),
        "prune_vs_inline_encoding_sd21_by_macs": round(ratio, 3),
        "prune_samples_per_s": round(batch / step, 1),
        "prune_floor_ms": round(1e3 * bare, 1),
        "encoders_fp32_ms": round(1e3 * inline, 1),
    }


def finetune_step(run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """The step of an expert's run against its UNets' bare passes."""
    config = configured(run.root)
    _, found = launched(expert_and_floor, config, run, "expert-0")
    batch, step, bare = config.finetune.apart.global_batch_size, found["step"], found["floor"]
    say(
        f"finetune: {1e3 * step:.0f} ms a step of {batch}, its floor {1e3 * bare:.0f} ms (teacher forward, expert forward "
        "and backward, AdamW)"
    )
    return {
        "finetune_vs_floor": round(step / bare, 3),
        "finetune_samples_per_s": round(batch / step, 1),
        "finetune_floor_ms": round(1e3 * bare, 1),
    }


def launched(worker: Any, config: Config, run: RunDir, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs a stage's worker as its stage does; returns its outcome, and what the worker measured besides."""
    outcome = launch(worker, config=config, run=run, name=name, **inputs_of(worker, config, run))
    return outcome, run.read_json("train", name, "seconds.json") if run.exists("train", name, "seconds.json") else {}


def inputs_of(worker: Any, config: Config, run: RunDir) -> dict[str, Any]:
    """What the stage of a worker launches it on. An expert gets all rows: how fast it learns does not depend on which."""
    from stages import finetune_extra, prune_run

    if worker in (prune_worker, prune_and_floor):
        return prune_run(config, run)
    return {
        "loop": config.finetune.apart,
        "rows": reader_of(config, run, "encoded", "train", embedding=True),
        "extra": finetune_extra(config, run, ("encoded", "train")) | {"expert": 0},
    }


def prune_and_floor(settings: dict[str, Any]) -> None:
    """The prune stage's worker; by turns with it the bare passes of a step, and the encoders in fp32."""
    worker = Worker.start(settings)
    teacher, inputs = bare_step(worker, settings)
    gated = GatedUNet(teacher)
    masks = torch.rand(len(inputs["sample"]), gated.space.dim, requires_grad=True)

    def floor() -> None:
        with autocast(worker.place.device, worker.config.prune.loop.precision):
            with torch.no_grad():
                target = run_unet(gated, *inputs.values())
            with gated.use(masks):
                output = run_unet(gated, *inputs.values())
        masks.grad = None
        (output.float() - target.float()).square().mean().backward()

    in_turns(prune_worker, settings, STEPS - WINDOW - 2, {"floor": floor, "encoders": encoders(worker)})


def expert_and_floor(settings: dict[str, Any]) -> None:
    """An expert's worker; by turns with it the bare passes of a step."""
    from aptp_ray.core.prune import prune_unet

    worker = Worker.start(settings)
    teacher, inputs = bare_step(worker, settings)
    code = PromptRouter.from_pretrained(worker.run.local("router")).hard_codes[0]
    student = fast_attention(prune_unet(teacher, code), worker.place.device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def floor() -> None:
        with autocast(worker.place.device, worker.config.finetune.apart.precision):
            with torch.inference_mode():
                target = run_unet(teacher, *inputs.values())
            output = run_unet(student, *inputs.values())
        optimizer.zero_grad(set_to_none=True)
        (output.float() - target.float()).square().mean().backward()
        optimizer.step()

    in_turns(expert_worker, settings, STEPS - WINDOW - 2, {"floor": floor})


def bare_step(worker: Worker, settings: dict[str, Any]) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """The teacher, and one batch as its forward takes it."""
    folder = worker.run.local("teacher")
    teacher = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False).eval()
    encoding = Encoding.from_json(settings["encoding"])
    batch = worker.config.prune.loop.global_batch_size
    draws = Draws(0, "benchmark", batch, encoding, len(noise_schedule(folder).alphas_cumprod))
    rows = decode_encoded(first_rows(worker.rows, batch), encoding)
    drawn = draws(rows, 0, slice(0, batch))
    inputs = {
        "sample": drawn["noise"],
        "timesteps": drawn["timesteps"],
        "text_states": drawn["text_states"],
        "text_mask": None,
    }
    return fast_attention(teacher, worker.place.device), inputs


def encoders(worker: Worker) -> Callable[[], Any]:
    """What the reference does inside of a step: VAE, text and prompt encoder in fp32 over the batch's images and captions."""
    from aptp_ray.data.encoder import Encoder
    from aptp_ray.data.rows import cropped_table, framed

    config, run = worker.config, worker.run
    layout, frame = layout_of(config, run, "train"), framing(config)
    samples = islice((row for unit in layout.units() for row in layout.read(unit)), config.prune.loop.global_batch_size)
    squares = cropped_table([square for row in samples for square in framed(row, frame)])
    threads = config.compute.threads_per_worker
    encoder = Encoder(replace(encoder_spec(config, run.address("teacher")), precision="fp32", threads=threads))
    return lambda: encoder(squares)


# -- workers and checkpoints ---------------------------------------------------------------------------------------------


def two_workers(run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """Samples a second of two prune workers with a thread each against one such worker: as many rows each, and half of them.

    With half of the rows a worker's passes are less efficient: each has the same thousands of small operations to start.
    """
    batch = configured(run.root).prune.loop.global_batch_size
    rates: dict[tuple[int, int], list[float]] = {}
    for turn, (workers, rows) in enumerate(((1, batch), (2, batch), (2, batch // 2), (2, batch), (1, batch))):
        option = f"prune.loop.global_batch_size={workers * rows}"
        config = configured(run.root, option, workers=workers, threads=1)
        outcome, _ = launched(prune_worker, config, run, f"prune-workers-turn-{turn}")
        rates.setdefault((workers, rows), []).append(outcome["samples_per_second"])
        say(f"prune, workers of one thread and {rows} rows: {workers} give {outcome['samples_per_second']:.1f} samples/s")
    means = {key: statistics.fmean(values) for key, values in rates.items()}
    alone = means[1, batch]
    return {
        "two_workers_speedup": round(means[2, batch] / alone, 3),
        "two_workers_speedup_same_global_batch": round(means[2, batch // 2] / alone, 3),
        "one_worker_samples_per_s": round(alone, 1),
        "two_workers_samples_per_s": round(means[2, batch], 1),
    }


def checkpoints(run: RunDir, say: Callable[[str], None]) -> dict[str, Any]:
    """What keeping a checkpoint every 50 steps adds to an expert's run: to the step that keeps it, and to those after it.

    These are set against the other steps of the same 50.
    """
    option = f"finetune.apart.checkpoint_every_steps={KEPT_EVERY}"
    config = configured(run.root, option, steps=KEPT_STEPS)
    _, found = launched(expert_by_steps, config, run, "expert-kept")
    # The seconds of step n are those between the beginnings of n and n + 1: a checkpoint after step 50 is in the 50th.
    seconds = found["steps"]
    cycles = [seconds[begin - 1 : begin - 1 + KEPT_EVERY] for begin in range(KEPT_EVERY, KEPT_STEPS - KEPT_EVERY + 1, KEPT_EVERY)]
    added = []
    for cycle in cycles:
        others = statistics.median(cycle[AFTER_KEEPING:])
        added.append((sum(cycle[:AFTER_KEEPING]) - AFTER_KEEPING * others) / (len(cycle) * others))
    first = statistics.median(cycle[0] - statistics.median(cycle[AFTER_KEEPING:]) for cycle in cycles)
    say(
        f"finetune: a checkpoint every {KEPT_EVERY} steps adds {statistics.median(added):.2%} to the steps' time; the step that "
        f"keeps it takes {1e3 * first:.0f} ms longer"
    )
    return {"checkpoint_overhead": round(statistics.median(added), 4), "checkpoint_step_ms": round(1e3 * first, 1)}


def expert_by_steps(settings: dict[str, Any]) -> None:
    """An expert's worker, which writes down how long each step took."""
    worker, taken = Worker.start(settings), list[float]()
    with between_steps(taken.append):
        expert_worker(settings)
    worker.run.write_json({"steps": taken}, "train", worker.name, "seconds.json")
