"""One function a stage: where the shells (data, train, evaluate, demo) are put together."""

from __future__ import annotations

from typing import Any

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, ConfigError
from cli import say
from rows import encode_rows, encoder_spec, framing, reader_of, write_images


def teacher(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains or fine-tunes the teacher, or takes it from its source as it is."""
    from aptp_ray.data.encoded import read_encoding
    from aptp_ray.train import teacher as stage
    from aptp_ray.train.launch import launch
    from aptp_ray.train.worker import empty_text_states

    if config.teacher.source is not None:
        figures = stage.import_teacher(config, run)
        if config.teacher.unet is None:
            return figures
        parts_dir = run.local("teacher")
    figures = {}
    if config.teacher.source is None:
        assert config.teacher.vae is not None
        if not run.exists("teacher_parts", "model_index.json"):
            images = ("teacher_images", "train")
            if not run.exists(*images, "index.json"):  # written last
                write_images(config, run, "train", images)
            figures["vae"] = launch(
                stage.vae_worker,
                config=config,
                run=run,
                name="teacher-vae",
                loop=config.teacher.vae.loop,
                rows=reader_of(config, run, *images),
            )
            say(f"teacher: VAE {figures['vae']}")
        parts_dir = stage.assemble(config, run)
    assert config.teacher.unet is not None
    rows = ("teacher_encoded", "train")
    kept = ("teacher_encoded", "encoding.json")  # written last; a stage that was killed after that need not encode again
    if not (run.exists(*kept) and "train" in run.read_json(*kept)["splits"]):
        encode_rows(config, run, "train", rows, parts_dir)
    figures["unet"] = launch(
        stage.unet_worker,
        config=config,
        run=run,
        name="teacher-unet",
        loop=config.teacher.unet.loop,
        rows=reader_of(config, run, *rows, pipeline_dir=parts_dir),
        extra={
            "pipeline_dir": parts_dir,
            "encoding": read_encoding(run, *rows).to_json(),
            "empty_states": empty_text_states(parts_dir),
        },
    )
    return figures


def encode_splits(config: Config, run: RunDir) -> dict[str, Any]:
    """Encodes both splits with the teacher's encoders."""
    facts: dict[str, Any] = {}
    for split in ("train", "validation"):
        counts = encode_rows(config, run, split, ("encoded", split), run.address("teacher"))
        facts[split] = {name: counts[name] for name in ("rows_in", "rows", "rejected", "views", "shards")}
    return facts


def checked_encoding(config: Config, run: RunDir, *folders: tuple[str, ...]) -> dict[str, Any]:
    """Returns what the rows of some folders are made of, once it is sure that the encoders at hand made them.

    The stage's hash covers what the config names; this covers what the names stand for: a folder whose content was
    replaced, a hub id that moved on.

    Raises:
        EncodingError: if another encoder made them, or at another resolution or text length.
        RunDirError: if a folder has not been written to its end.
    """
    from aptp_ray.data.encoded import read_encoding
    from aptp_ray.data.encoder import describe

    found = [read_encoding(run, *parts) for parts in folders]
    at_hand = describe(encoder_spec(config, run.address("teacher")), framing(config), config.encode.mode)
    for encoding in found:
        encoding.check_same(at_hand)
    return at_hand.to_json()


def prune_run(config: Config, run: RunDir) -> dict[str, Any]:
    """Returns what the prune stage's run is launched on: rows, and what its workers get besides."""
    import ray

    from aptp_ray.data import schema
    from aptp_ray.data.encoded import read_first
    from aptp_ray.train.feed import first_rows
    from aptp_ray.train.prune import ROUTING_PROMPTS
    from aptp_ray.train.sizes import ROWS as NEEDS_ROWS

    encoding = checked_encoding(config, run, ("encoded", "train"), ("encoded", "validation"))
    prompts = {
        split: read_first(run, "encoded", split, columns=[schema.EMBEDDING, schema.CAPTION], rows=ROUTING_PROMPTS)
        for split in ("train", "validation")
    }
    rows = reader_of(config, run, "encoded", "train", embedding=True)
    samples = first_rows(rows, config.prune.importance_samples)
    needs = {"needs": ray.put(first_rows(rows, NEEDS_ROWS))} if config.prune.hardening == "needs" else {}
    return {
        "loop": config.prune.loop,
        "rows": rows,
        "validation": reader_of(config, run, "encoded", "validation", embedding=True),
        "extra": {
            "encoding": encoding,
            "samples": ray.put(samples),
            "prompts": ray.put(prompts["train"]),
            "validation_prompts": ray.put(prompts["validation"]),
            **needs,
        },
    }


def prune(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains the router and hardens its codes; or makes one code by a rule."""
    from aptp_ray.train.launch import launch
    from aptp_ray.train.prune import prune_worker
    from aptp_ray.train.static import static_worker

    worker = prune_worker if config.prune.codes == "learned" else static_worker
    return launch(worker, config=config, run=run, name="prune", **prune_run(config, run))


def assign(config: Config, run: RunDir) -> dict[str, Any]:
    """Gives every training row to its expert, and writes how validation captions are routed."""
    from aptp_ray.data.assign import assign_split, routing_table

    checked_encoding(config, run, ("encoded", "train"), ("encoded", "validation"))
    router = run.address("router")
    facts = assign_split(run, router_dir=router, num_experts=config.router.experts)
    routing_table(run, router_dir=router, prompt_encoder=config.router.prompt_encoder)
    return facts


def finetune_extra(config: Config, run: RunDir, *folders: tuple[str, ...]) -> dict[str, Any]:
    """Returns what fine-tuning's workers get besides their rows, which lie in ``folders``."""
    from aptp_ray.data import schema
    from aptp_ray.data.encoded import read_first
    from aptp_ray.train.finetune import HELD_OUT
    from aptp_ray.train.worker import empty_text_states

    return {
        "encoding": checked_encoding(config, run, *folders),
        "empty_states": empty_text_states(run.local("teacher")),
        "held_out": read_first(run, "encoded", "validation", columns=[schema.EMBEDDING, schema.CAPTION], rows=HELD_OUT),
    }


def finetune(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains the experts: first together, then each apart, several side by side."""
    from aptp_ray.data import schema
    from aptp_ray.train.experts import ExpertRun, most_at_once, steps_of, train_experts
    from aptp_ray.train.finetune import shared_worker
    from aptp_ray.train.launch import launch

    # Assigned rows are copies: they may be older than the encoded ones.
    assigned = [("assigned", f"{schema.EXPERT}={expert}") for expert in range(config.router.experts)]
    extra = finetune_extra(config, run, ("encoded", "train"), *assigned)
    facts: dict[str, Any] = {}
    if config.finetune.shared is not None:
        facts["shared"] = launch(
            shared_worker,
            config=config,
            run=run,
            name="finetune-shared",
            loop=config.finetune.shared,
            rows=reader_of(config, run, "encoded", "train", embedding=True),
            validation=reader_of(config, run, "encoded", "validation", embedding=True),
            extra=extra,
        )
        say(f"finetune: shared phase {facts['shared']['train_seconds']:.0f} s")
    readers = [reader_of(config, run, *parts) for parts in assigned]
    lanes = config.finetune.apart.num_lanes()
    small = [f"{expert} ({reader.num_rows})" for expert, reader in enumerate(readers) if reader.num_rows < lanes]
    if small:
        raise ConfigError(
            f"too few rows are assigned to expert {', '.join(small)}: an epoch needs one for each of the "
            f"{lanes} lanes; encode more data, or prune again with fewer router.experts"
        )
    steps = steps_of(config, [reader.num_rows for reader in readers])
    runs = [
        ExpertRun(expert, reader, config.finetune.apart.model_copy(update={"steps": count}), extra)
        for expert, (reader, count) in enumerate(zip(readers, steps, strict=True))
    ]
    held_out = reader_of(config, run, "encoded", "validation")
    facts["experts"] = train_experts(
        runs, validation=held_out, config=config, run=run, at_once=most_at_once(config), say=say
    )
    return facts


def report(config: Config, run: RunDir) -> dict[str, Any]:
    """Draws samples with teacher and experts and writes the page of figures, which is logged, too."""
    from aptp_ray.evaluate.report import build_report
    from aptp_ray.tracking import Tracker

    prompts = list(config.report.prompts or ())
    if not prompts and config.data.source.kind == "openmoji":
        from aptp_ray.demo.prompts import SHOWCASE

        count = min(config.report.num_prompts, len(SHOWCASE))
        # Spread over the showcase, which is sorted by kind of scene.
        prompts = [SHOWCASE[index * len(SHOWCASE) // count].text for index in range(count)]
    figures = build_report(config, run, prompts)
    tracker = Tracker.of(config, "report", directory=run.path("wandb") if run.is_local else None)
    if tracker.enabled:
        tracker.log_page("report", run.read_bytes("report", "index.html").decode(), step=0)
        tracker.summary({name: value for name, value in figures.items() if isinstance(value, (int, float))})
    tracker.finish()
    return figures


STAGE_FUNCTIONS = {
    "teacher": teacher,
    "encode": encode_splits,
    "prune": prune,
    "assign": assign,
    "finetune": finetune,
    "report": report,
}
