"""Small checkpoints in the published layout, written here from its description, and what becomes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, parse_config
from aptp_ray.core.components import load_unet
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.hub.importing import import_reference
from aptp_ray.hub.mixture import MixturePipeline
from aptp_ray.hub.reference import CheckpointError, read_layout
from tests.serve.conftest import ENCODER, SIDE, write_teacher

REPOSITORY = Path(__file__).resolve().parents[2]
Z, EXPERTS = 384, 2


def published_structure(unet: Any) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Block by block all resnets, then all transformers; and the modules' names, of which the last of each kind can go."""
    width, depth, names = [], [], []
    blocks = [(f"down_blocks.{i}", b) for i, b in enumerate(unet.down_blocks)]
    blocks += [("mid_block", unet.mid_block), *((f"up_blocks.{i}", b) for i, b in enumerate(unet.up_blocks))]
    space = ArchitectureSpace.of(unet)
    removable = {site.name for site in space.depth_sites}
    for path, block in blocks:
        for part in ("resnets", "attentions"):
            for i, module in enumerate(getattr(block, part, ())):
                if part == "resnets":
                    width.append([module.norm2.num_groups])
                else:
                    layer = module.transformer_blocks[0]
                    width.append([layer.attn1.heads, layer.attn2.heads, 32])
                names.append(f"{path}.{part}.{i}")
                depth.append([int(names[-1] in removable)])
    return width, depth, names


def our_code(unet: Any, vector: Tensor) -> dict[str, Tensor]:
    """Masks by module path, read off a published vector by its description; no code of ours involved."""
    width, depth, names = published_structure(unet)
    found, start = {}, 0
    for name, widths in zip(names, width, strict=True):
        parts = [""] if len(widths) == 1 else [f".transformer_blocks.0.{p}" for p in ("attn1", "attn2", "ff")]
        for part, n in zip(parts, widths, strict=True):
            found[name + part] = vector[start : start + n] >= 0.5
            start += n
    gone = [name for name, flag in zip(names, depth, strict=True) if flag == [1]]
    return found | {f"{name}:depth": vector[start + i : start + i + 1] >= 0.5 for i, name in enumerate(gone)}


def cut_by_hand(unet: Any, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a pruned UNet as they are published: channels taken out, closed modules' weights not there."""
    state = dict(unet.state_dict())
    for name, mask in masks.items():
        module = None if name.endswith(":depth") else unet.get_submodule(name)
        if name.endswith(".ff"):
            rows = mask.repeat_interleave(module.net[2].in_features // 32)
            for key in ("net.0.proj.weight", "net.0.proj.bias"):
                state[f"{name}.{key}"] = state[f"{name}.{key}"][torch.cat([rows, rows])]
            state[f"{name}.net.2.weight"] = state[f"{name}.net.2.weight"][:, rows]
        elif ".attn" in name:
            rows = mask.repeat_interleave(module.inner_dim // module.heads)
            for key in ("to_q.weight", "to_k.weight", "to_v.weight"):
                state[f"{name}.{key}"] = state[f"{name}.{key}"][rows]
            state[f"{name}.to_out.0.weight"] = state[f"{name}.to_out.0.weight"][:, rows]
        elif module is not None:
            rows = mask.repeat_interleave(module.norm2.num_channels // module.norm2.num_groups)
            for key in ("conv1", "time_emb_proj", "norm2"):
                for kind in ("weight", "bias"):
                    state[f"{name}.{key}.{kind}"] = state[f"{name}.{key}.{kind}"][rows]
            state[f"{name}.conv2.weight"] = state[f"{name}.conv2.weight"][:, rows]
    closed = [name.removesuffix(":depth") for name, mask in masks.items() if name.endswith(":depth") and not mask.item()]
    return {key: value.contiguous() for key, value in state.items() if not any(key.startswith(f"{gone}.") for gone in closed)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher and a checkpoint pruned from it."""
    root = tmp_path_factory.mktemp("published")
    unet = write_teacher(root / "teacher").eval()
    width, depth, names = published_structure(unet)
    num_width, num_depth = sum(sum(w) for w in width), sum(d[0] for d in depth)
    length, generator = num_width + num_depth, torch.Generator().manual_seed(0)
    order = [-1, 0, *range(1, num_depth - 1)]
    structure = {"width": width, "depth": depth}
    published = root / "checkpoint"
    heads = [n for w in width for n in w] + [num_depth]
    tensors = {}
    for i, n in enumerate(heads):
        tensors[f"mh_fc.{i}.parametrizations.weight.original0"] = 1 + torch.rand(n, 1, generator=generator)
        tensors[f"mh_fc.{i}.parametrizations.weight.original1"] = torch.randn(n, Z, generator=generator)
    embedding = torch.randn(EXPERTS, length, generator=generator)
    for name, config, weights in (
        ("hypernet", {"structure": structure, "input_dim": Z}, tensors),
        ("quantizer", {"structure": structure, "n_e": EXPERTS, "depth_order": order, "temperature": 0.4, "base": 2},
         {"embedding.weight": embedding, "embedding_gs": embedding.sigmoid()}),
    ):  # fmt: skip
        (published / name).mkdir(parents=True)
        (published / name / "config.json").write_text(json.dumps(config))
        save_file(weights, published / name / "diffusion_pytorch_model.safetensors")
    vectors = []
    for k in range(EXPERTS):
        # As published, the vector beside the UNet's folder; and both in one.
        folder = published / (f"arch{k}/checkpoint-30000" if k == 0 else f"arch{k}/unet")
        unet_folder = folder / "unet" if k == 0 else folder
        unet_folder.mkdir(parents=True)
        vector = torch.rand(1, length, generator=generator)
        for i in range(num_width):  # no width is empty: every second mask is open
            vector[0, i] = 0.9 if i % 2 == k else vector[0, i]
        vector[0, num_width:] = torch.tensor([0.1 if i == k else 0.8 for i in range(num_depth)])
        torch.save(vector, folder / "arch_vector.pt")
        save_file(cut_by_hand(unet, our_code(unet, vector[0])), unet_folder / "diffusion_pytorch_model.safetensors")
        vectors.append(vector[0])
    return {"root": root, "unet": unet, "checkpoint": published, "vectors": vectors, "order": order, "tensors": tensors,
            "embedding": embedding, "heads": heads, "num_width": num_width, "names": names}  # fmt: skip


def config_for(made: dict[str, Any], run_dir: Path) -> Config:
    return parse_config(
        {
            "name": "imported", "run_dir": str(run_dir), "data": {"source": {"kind": "openmoji"}, "resolution": SIDE},
            "teacher": {"source": str(made["root"] / "teacher"), "max_tokens": 12},
            "router": {"experts": EXPERTS, "prompt_encoder": ENCODER}, "sampling": {"num_inference_steps": 3},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def imported(made: dict[str, Any]) -> Path:
    run_dir = made["root"] / "run"
    figures = import_reference(made["checkpoint"], config_for(made, run_dir), RunDir(str(run_dir)))
    assert figures["experts"] == EXPERTS and any("noise" in line for line in figures["not_exact"])
    return run_dir


def test_experts_put_out_what_the_masked_teacher_does(made: dict[str, Any], imported: Path) -> None:
    gated = GatedUNet(made["unet"])
    sample, text = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(1, 12, 16)
    for k, vector in enumerate(made["vectors"]):
        masks = our_code(made["unet"], vector)
        code = torch.cat([masks[site.key] for site in gated.space.sites])
        expert = load_unet(imported / "experts" / str(k))
        with torch.no_grad(), gated.use(code):
            expected, out = gated(sample, 5, text).sample, expert(sample, 5, text).sample
        assert float((out - expected).abs().max() / expected.abs().max()) <= 1e-5
    gated.remove()


def test_the_router_holds_the_published_map_and_codes(made: dict[str, Any], imported: Path) -> None:
    router = PromptRouter.from_pretrained(imported / "router")
    z = torch.nn.functional.normalize(torch.randn(5, Z, generator=torch.Generator().manual_seed(2)), dim=1)
    # The published map, head by head.
    rows = []
    for i in range(len(made["heads"])):
        g, v = (made["tensors"][f"mh_fc.{i}.parametrizations.weight.original{j}"] for j in (0, 1))
        rows.append(g * v / v.norm(dim=1, keepdim=True))
    published = z @ torch.cat(rows).T
    names = [f"{name}:depth" for name, flag in zip(made["names"], published_structure(made["unet"])[1], strict=True) if flag[0]]
    with torch.no_grad():
        ours = router.space.view(router.embed(z))
    start = 0
    for name, widths in zip(made["names"], published_structure(made["unet"])[0], strict=True):
        parts = [""] if len(widths) == 1 else [f".transformer_blocks.0.{p}" for p in ("attn1", "attn2", "ff")]
        for part, n in zip(parts, widths, strict=True):
            torch.testing.assert_close(ours[name + part], published[:, start : start + n], rtol=1e-4, atol=1e-4)
            start += n
    for place, module in enumerate(made["order"]):  # the i-th depth logit belongs to the module that the order names
        torch.testing.assert_close(ours[names[module]][:, 0], published[:, start + place], rtol=1e-4, atol=1e-4)
    assert router.base == 2 and router.tau == 0.4 and not router.centre and not router.duals
    first = router.space.sites[0]
    assert torch.equal(router.codes[:, first.slice], made["embedding"][:, : first.width])


def test_it_draws(imported: Path) -> None:
    pipe = MixturePipeline.from_pretrained(imported)
    out = pipe(["a red apple", "the sky"])
    assert len(out.images) == 2 and out.experts == pipe(["a red apple", "the sky"]).experts
    facts = json.loads((imported / "routing.json").read_text())
    assert 0 < facts["macs_ratio"] < 1 and [entry["share"] for entry in facts["experts"]] == [0.5, 0.5]


def test_a_checkpoint_of_something_else_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(made["checkpoint"], tmp_path / name))

    def refuse(folder: Path, match: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=match):
            import_reference(folder, config_for(made, tmp_path / "run"), RunDir(str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()

    folder = broken("short")
    torch.save(torch.ones(1, 7), folder / "arch0" / "checkpoint-30000" / "arch_vector.pt")
    refuse(folder, "its structure says")
    folder = broken("pickle")
    torch.save(Fraction(1, 2), folder / "arch0" / "checkpoint-30000" / "arch_vector.pt")  # an object, not a tensor: never built
    refuse(folder, "(?i)weights.only", Exception)
    folder = broken("swapped")
    first = folder / "arch0" / "checkpoint-30000" / "arch_vector.pt"
    first.replace(folder / "a.pt")
    shutil.copy(folder / "arch1" / "unet" / "arch_vector.pt", first)
    refuse(folder, "not those of its masks")
    folder = broken("gone")
    shutil.rmtree(folder / "arch1")
    refuse(folder, "1 experts")
    refuse(tmp_path / "nothing", "no config.json", FileNotFoundError)
    space = ArchitectureSpace.of(made["unet"])
    width, depth, _ = published_structure(made["unet"])
    for structure, match in (
        ({"width": width[:-1], "depth": depth[:-1]}, "smaller UNet"),
        ({"width": [*width, [8]], "depth": [*depth, [0]]}, "larger UNet"),
        ({"width": [[4], *width[1:]], "depth": depth}, "8 entries in this teacher, 4"),
        ({"width": width, "depth": [[1]] * len(depth)}, "this teacher cannot"),
    ):
        with pytest.raises(CheckpointError, match=match):
            read_layout(space, made["unet"], structure, None)


@pytest.mark.slow
def test_the_job_says_what_is_not_exact(made: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_for(made, tmp_path / "run").to_yaml())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/import_reference.py", str(config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)

    done = run(str(made["checkpoint"]))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["experts"] == EXPERTS and (tmp_path / "run" / "routing.json").is_file()
    assert "not carried over exactly: routing" in done.stderr
    again = run(str(made["checkpoint"]))
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert run(str(tmp_path / "nothing" / "here" / "at_all"), "--overwrite").returncode != 0
