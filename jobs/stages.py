"""One function a stage: where the shells (data, train, evaluate, demo) are put together."""

from __future__ import annotations

from typing import Any

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.tracking import Progress
from cli import say


def shard_patterns(config: Config, run: RunDir) -> dict[str, str]:
    """Returns the shard patterns of both splits; the demo's shards are drawn first, where they are not there yet."""
    source = config.data.source
    if source.kind == "webdataset":
        assert source.train and source.validation
        return {"train": source.train, "validation": source.validation}
    from aptp_ray.demo.shards import build_shards

    total = source.train_images + source.validation_images
    progress = Progress("shards", total, unit="images")
    build_shards(
        run.address("shards"),
        seed=config.seed,
        image_size=config.data.resolution,
        train_images=source.train_images,
        validation_images=source.validation_images,
        images_per_shard=source.images_per_shard,
        progress=lambda done, _: progress.update(done),
        storage_options=run.storage_options or None,
    )
    return {split: run.address("shards", split, "*.tar") for split in ("train", "validation")}


def shard_options(config: Config, run: RunDir) -> dict[str, Any] | None:
    """Returns the storage options of the shards: the demo's lie in the run directory, others where ``data.source`` says."""
    drawn = config.data.source.kind == "openmoji"
    return (run.storage_options if drawn else config.source_options()) or None


def teacher(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains or fine-tunes the teacher, or takes it from its source as it is."""
    from aptp_ray.data.encoded import count_rows, read_encoding
    from aptp_ray.train import teacher as stage
    from aptp_ray.train.launch import launch
    from aptp_ray.train.worker import empty_text_states

    if config.teacher.source is not None:
        figures = stage.import_teacher(config, run)
        if config.teacher.unet is None:
            return figures
        parts_dir = run.local("teacher")
    patterns = shard_patterns(config, run)
    figures = {}
    if config.teacher.source is None:
        assert config.teacher.vae is not None
        if not run.exists("teacher_parts", "model_index.json"):
            images = usable_images(patterns["train"], shard_options(config, run))
            figures["vae"] = launch(
                stage.vae_worker,
                config=config,
                run=run,
                name="teacher-vae",
                loop=config.teacher.vae.loop,
                datasets={"train": images},
                total_rows=images.count(),
            )
            say(f"teacher: VAE {figures['vae']}")
        parts_dir = stage.assemble(config, run)
    assert config.teacher.unet is not None
    rows = ("teacher_encoded", "train")
    # A stage that was killed goes on where it stopped: rows that were encoded whole (encoding.json comes last) are kept.
    kept = ("teacher_encoded", "encoding.json")
    if not (run.exists(*kept) and "train" in run.read_json(*kept)["splits"]):
        encode(config, run, patterns["train"], rows, parts_dir)
    figures["unet"] = launch(
        stage.unet_worker,
        config=config,
        run=run,
        name="teacher-unet",
        loop=config.teacher.unet.loop,
        datasets={"train": training_rows(run, *rows)},
        total_rows=count_rows(run, *rows),
        extra={
            "pipeline_dir": parts_dir,
            "encoding": read_encoding(run, *rows).to_json(),
            "empty_states": empty_text_states(parts_dir),
        },
    )
    return figures


def usable_images(pattern: str, storage_options: dict[str, Any] | None) -> Any:
    """Returns the images of a shard pattern, without the rows that cannot be used; the options are the shards'."""
    from ray.data.expressions import col

    from aptp_ray.data import schema
    from aptp_ray.data.sources import webdataset

    rows = webdataset(pattern, storage_options=storage_options)
    return rows.filter(expr=col(schema.REASON) == "").select_columns([schema.IMAGE])


def training_rows(run: RunDir, *parts: str, embedding: bool = False) -> Any:
    """Returns the columns of encoded rows that training reads."""
    from aptp_ray.data import schema
    from aptp_ray.data.encoded import read_encoded

    columns = [*schema.TENSORS, *([schema.EMBEDDING] if embedding else [])]
    return read_encoded(run, *parts, columns=columns)


def encode(config: Config, run: RunDir, pattern: str, parts: tuple[str, ...], pipeline_dir: str) -> dict[str, Any]:
    """Encodes one split as the config says."""
    from aptp_ray.data.encode import encode_split

    return encode_split(
        pattern,
        run,
        parts,
        pipeline_dir=pipeline_dir,
        prompt_encoder_source=config.router.prompt_encoder,
        resolution=config.data.resolution,
        batch_size=config.data.batch_size,
        num_actors=config.data.encoders,
        precision=config.data.precision,
        rows_per_file=config.data.rows_per_file,
        storage_options=shard_options(config, run),
    )


def encode_splits(config: Config, run: RunDir) -> dict[str, Any]:
    """Encodes both splits with the teacher's encoders."""
    facts: dict[str, Any] = {}
    for split, pattern in shard_patterns(config, run).items():
        counts = encode(config, run, pattern, ("encoded", split), run.address("teacher"))
        facts[split] = {name: counts[name] for name in ("rows_in", "rows", "rejected")}
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
    from aptp_ray.data.encoder import EncoderSpec, describe

    found = [read_encoding(run, *parts) for parts in folders]
    spec = EncoderSpec(run.address("teacher"), config.router.prompt_encoder, storage_options=run.storage_options)
    at_hand = describe(spec, config.data.resolution)
    for encoding in found:
        encoding.check_same(at_hand)
    return at_hand.to_json()


def prune(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains the router and hardens its codes."""
    import ray

    from aptp_ray.data import schema
    from aptp_ray.data.encoded import count_rows, read_first
    from aptp_ray.train.launch import launch
    from aptp_ray.train.prune import ROUTING_PROMPTS, prune_worker

    encoding = checked_encoding(config, run, ("encoded", "train"), ("encoded", "validation"))
    prompts = {
        split: read_first(run, "encoded", split, columns=[schema.EMBEDDING], rows=ROUTING_PROMPTS)
        for split in ("train", "validation")
    }
    samples = read_first(run, "encoded", "train", columns=schema.TENSORS, rows=config.prune.importance_samples)
    return launch(
        prune_worker,
        config=config,
        run=run,
        name="prune",
        loop=config.prune.loop,
        datasets={"train": training_rows(run, "encoded", "train", embedding=True)},
        total_rows=count_rows(run, "encoded", "train"),
        extra={
            "encoding": encoding,
            "samples": ray.put(samples),
            "prompts": ray.put(prompts["train"]),
            "validation_prompts": ray.put(prompts["validation"]),
        },
    )


def assign(config: Config, run: RunDir) -> dict[str, Any]:
    """Gives every training row to its expert, and writes how validation captions are routed."""
    from aptp_ray.data.assign import assign_split, routing_table

    checked_encoding(config, run, ("encoded", "train"), ("encoded", "validation"))
    router = run.address("router")
    facts = assign_split(run, router_dir=router, num_experts=config.router.experts)
    routing_table(run, router_dir=router, prompt_encoder=config.router.prompt_encoder)
    return facts


def finetune(config: Config, run: RunDir) -> dict[str, Any]:
    """Trains the experts: first together, then each apart, several side by side."""
    import ray

    from aptp_ray.data import schema
    from aptp_ray.data.encoded import count_rows
    from aptp_ray.train.finetune import expert_worker, shared_worker
    from aptp_ray.train.launch import launch
    from aptp_ray.train.worker import empty_text_states

    # Assigned rows are copies: they may be older than the encoded ones.
    assigned = [("assigned", f"{schema.EXPERT}={expert}") for expert in range(config.router.experts)]
    extra = {
        "encoding": checked_encoding(config, run, ("encoded", "train"), *assigned),
        "empty_states": empty_text_states(run.local("teacher")),
    }
    facts: dict[str, Any] = {}
    if config.finetune.shared is not None:
        facts["shared"] = launch(
            shared_worker,
            config=config,
            run=run,
            name="finetune-shared",
            loop=config.finetune.shared,
            datasets={"train": training_rows(run, "encoded", "train", embedding=True)},
            total_rows=count_rows(run, "encoded", "train"),
            extra=extra,
        )
        say(f"finetune: shared phase {facts['shared']['train_seconds']:.0f} s")
    # A task starts each run, because TorchTrainer.fit() needs the main thread of its process.
    start = ray.remote(num_cpus=0)(launch)
    waiting = list(range(config.router.experts))
    running: dict[Any, int] = {}
    figures: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < side_by_side(config):
            expert = waiting.pop(0)
            rows = assigned[expert]
            reference = start.remote(
                expert_worker,
                config=config,
                run=run,
                name=f"expert-{expert}",
                loop=config.finetune.apart,
                datasets={"train": training_rows(run, *rows)},
                total_rows=count_rows(run, *rows),
                extra=extra | {"expert": expert},
            )
            running[reference] = expert
        done, _ = ray.wait(list(running))
        for reference in done:
            expert = running.pop(reference)
            figures[expert] = ray.get(reference)
            say(f"finetune: expert {expert}, {figures[expert]['train_seconds']:.0f} s")
    facts["experts"] = [figures[expert] for expert in sorted(figures)]
    return facts


def side_by_side(config: Config) -> int:
    """Returns how many experts are fine-tuned at once: as many as fill the config's Train workers."""
    if config.finetune.parallel_experts is not None:
        return config.finetune.parallel_experts
    each = config.finetune.apart.workers or config.compute.workers
    return max(1, config.compute.workers // each)


def report(config: Config, run: RunDir) -> dict[str, Any]:
    """Draws samples with teacher and experts and writes the page of figures."""
    from aptp_ray.evaluate.report import build_report

    prompts = list(config.report.prompts or ())
    if not prompts and config.data.source.kind == "openmoji":
        from aptp_ray.demo.prompts import SHOWCASE

        count = min(config.report.num_prompts, len(SHOWCASE))
        # Spread over the showcase, which is sorted by kind of scene.
        prompts = [SHOWCASE[index * len(SHOWCASE) // count].text for index in range(count)]
    return build_report(config, run, prompts)


STAGE_FUNCTIONS = {
    "teacher": teacher,
    "encode": encode_splits,
    "prune": prune,
    "assign": assign,
    "finetune": finetune,
    "report": report,
}
