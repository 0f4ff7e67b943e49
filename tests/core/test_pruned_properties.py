"""What diffusers asks of all its models, asked of pruned ones: files, precision, determinism, processors, memory, speed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from aptp_ray.core.adapters import fit_lora, fuse_lora
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.prune import PRUNED_CLASSES, prune_unet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import inputs_for, tiny_pixart, tiny_sd15, tiny_sdxl

TEACHERS: dict[str, Callable[[], Any]] = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "pixart": tiny_pixart}


def _code(model: Any, keep: float = 0.6) -> Tensor:
    space = ArchitectureSpace.of(model)
    code = space.random_code(keep, torch.Generator().manual_seed(2))
    code[space.num_width :: 3] = False  # some closed blocks
    return code


@pytest.fixture(params=TEACHERS)
def pruned(request: pytest.FixtureRequest) -> Any:
    model = TEACHERS[request.param]()
    return prune_unet(model, _code(model))


@torch.no_grad()
def _run(model: Any, **options: Any) -> Tensor:
    return model(**inputs_for(model), **options).sample


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def test_the_same_input_gives_the_same_output_in_either_form(pruned: Any) -> None:
    first = _run(pruned)
    assert torch.equal(_run(pruned), first)
    assert torch.equal(copy.deepcopy(pruned)(**inputs_for(pruned)).sample, first)
    with torch.no_grad():
        assert torch.equal(pruned(**inputs_for(pruned), return_dict=False)[0], first)


def test_files_in_shards_and_in_half_precision(pruned: Any, tmp_path: Path) -> None:
    kind = type(pruned)
    assert kind in PRUNED_CLASSES
    pruned.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(_run(kind.from_pretrained(tmp_path)), _run(pruned))
    placed = kind.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(_run(placed), _run(pruned))
    for dtype in (torch.float16, torch.bfloat16):
        pruned.to(dtype).save_pretrained(tmp_path / "half", variant="half")
        half = kind.from_pretrained(tmp_path / "half", torch_dtype=dtype, variant="half")
        assert half.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), pruned.state_dict().values(), strict=True))
    # Built from its config alone, it has its shapes, not the teacher's.
    again = kind.from_config(pruned.config)
    assert [p.shape for p in again.parameters()] == [p.shape for p in pruned.parameters()]


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_parts_of_it_may_lie_on_the_disk(name: str, tmp_path: Path) -> None:
    """A device map, as accelerate makes them where memory is short: what is on the disk comes when it is called."""
    model = TEACHERS[name]()
    pruned = prune_unet(model, _code(model))
    pruned.save_pretrained(tmp_path / "whole")
    far = ("up_blocks", "transformer_blocks")
    tops = [*pruned.named_children(), *pruned.named_parameters(recurse=False)]
    places = {top: "disk" if top in far else "cpu" for top, _ in tops}
    placed = type(pruned).from_pretrained(tmp_path / "whole", device_map=places, offload_folder=tmp_path / "far")
    away = [n for n, p in placed.named_parameters() if p.device.type == "meta"]
    assert away and all(n.startswith(far) for n in away)
    assert torch.equal(_run(placed), _run(pruned))


def test_bfloat16_is_near_float32(pruned: Any) -> None:
    exact, half = _run(pruned), pruned.to(torch.bfloat16)
    inputs = inputs_for(half)
    cast = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    cast["added_cond_kwargs"] = {
        k: v if v is None else v.bfloat16() for k, v in inputs.get("added_cond_kwargs", {}).items()
    }  # fmt: skip
    with torch.no_grad():
        out = half(**cast).sample
    assert out.dtype == torch.bfloat16 and _relative(out, exact) < 0.1


def test_attention_processors_are_set_one_by_one_and_all_at_once(pruned: Any) -> None:
    expected, names = _run(pruned), list(pruned.attn_processors)
    assert names and {type(p) for p in pruned.attn_processors.values()} == {AttnProcessor2_0}
    pruned.set_attn_processor(AttnProcessor())
    assert _relative(_run(pruned), expected) < 1e-5
    pruned.set_attn_processor({name: AttnProcessor2_0() if i % 2 else AttnProcessor() for i, name in enumerate(names)})
    assert _relative(_run(pruned), expected) < 1e-5
    with pytest.raises(ValueError, match="number of processors"):
        pruned.set_attn_processor({names[0]: AttnProcessor()})
    pruned.set_default_attn_processor()
    assert _relative(_run(pruned), expected) < 1e-5


def test_projections_fuse_and_part_again(pruned: Any) -> None:
    expected = _run(pruned)
    pruned.fuse_qkv_projections()
    assert _relative(_run(pruned), expected) < 1e-5
    pruned.unfuse_qkv_projections()
    assert _relative(_run(pruned), expected) < 1e-6


def test_what_saves_memory_changes_nothing() -> None:
    unet = tiny_sdxl()
    pruned = prune_unet(unet, _code(unet))
    expected = _run(pruned)
    for size in ("auto", "max"):
        pruned.set_attention_slice(size)
        assert _relative(_run(pruned), expected) < 1e-5
    pruned.set_attn_processor(AttnProcessor2_0())
    assert _relative(_run(pruned.to(memory_format=torch.channels_last)), expected) < 1e-5
    pruned.enable_freeu(s1=1.0, s2=1.0, b1=1.0, b2=1.0)
    assert _relative(_run(pruned), expected) < 1e-4
    pruned.disable_freeu()
    pruned.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert 0 < _relative(_run(pruned), expected) < 0.1


def test_gradient_checkpointing_changes_no_gradient(pruned: Any) -> None:
    def gradients() -> list[Tensor]:
        pruned.zero_grad()
        pruned.train()(**inputs_for(pruned)).sample.square().mean().backward()
        return [p.grad.clone() for p in pruned.parameters()]

    plain = gradients()
    pruned.enable_gradient_checkpointing()
    assert pruned.is_gradient_checkpointing
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    pruned.disable_gradient_checkpointing()
    assert not pruned.is_gradient_checkpointing


@pytest.mark.slow
def test_it_is_traced_whole(pruned: Any) -> None:
    expected = _run(pruned)
    torch._dynamo.reset()
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert _relative(compiled(**inputs_for(pruned)).sample, expected) < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_compiles(pruned: Any) -> None:
    expected = _run(pruned)
    pruned.compile()
    assert _relative(_run(pruned), expected) < 1e-4
    torch._dynamo.reset()


def _lora(model: Any) -> dict[str, Tensor]:
    """Rank 2 on every attention, feed-forward and residual convolution, under the names of a pipeline's file."""
    generator, state = torch.Generator().manual_seed(5), {}
    parts = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj", "proj_out")
    for name, module in model.named_modules():
        if name.endswith(parts) and hasattr(module, "weight") and module.weight.ndim in (2, 4):
            outputs, inputs, *kernel = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = 0.05 * torch.randn(2, inputs, *kernel, generator=generator)
            state[f"unet.{name}.lora_B.weight"] = 0.05 * torch.randn(outputs, 2, *[1] * len(kernel), generator=generator)
    return state


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teachers_lora_fits_the_pruned_model(name: str) -> None:
    """Cut and fused is fused and cut."""
    model = TEACHERS[name]()
    code, state = _code(model), _lora(model)
    pruned = prune_unet(model, code)
    before = _run(pruned)
    fitted = fit_lora(state, pruned)
    assert len(fitted) < len(state)  # closed blocks take theirs along
    fuse_lora(pruned, fitted)
    fuse_lora(model, state)
    expected = _run(prune_unet(model, code))
    assert _relative(_run(pruned), expected) < 1e-5 < 1e-3 < _relative(before, expected)


def test_another_models_lora_is_refused() -> None:
    model = tiny_sd15()
    pruned = prune_unet(model, _code(model))
    with pytest.raises(ValueError, match="not this teacher's LoRA"):
        fit_lora({"unet.conv_in.lora_A.weight": torch.zeros(2, 7, 3, 3)}, pruned)
    with pytest.raises(ValueError, match="not this teacher's LoRA"):
        fit_lora({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 7)}, pruned)
    with pytest.raises(ValueError, match="one factor of conv_in alone"):
        fuse_lora(pruned, {"conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3)})
    assert fit_lora({"unet.conv_in.alpha": torch.tensor(2.0)}, pruned) == {"unet.conv_in.alpha": torch.tensor(2.0)}


def test_a_teachers_ip_adapter_fits_the_pruned_model() -> None:
    """Loaded into the pruned model, it does what it does to the teacher under the same masks."""
    model = tiny_sd15()
    generator = torch.Generator().manual_seed(6)
    gated, code = GatedUNet(model), _code(model)
    pruned = prune_unet(model, code)
    layers = [n for n in model.attn_processors if n.endswith("attn2.processor")]
    ip_adapter = {}
    for number, name in enumerate(layers):
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for key in ("to_k_ip", "to_v_ip"):
            ip_adapter[f"{2 * number + 1}.{key}.weight"] = torch.randn(width, 24, generator=generator)
    image_proj = {
        "proj.weight": 0.3 * torch.randn(4 * 24, 10, generator=generator), "proj.bias": torch.zeros(4 * 24),
        "norm.weight": torch.ones(24), "norm.bias": torch.zeros(24),
    }  # fmt: skip
    inputs = inputs_for(model)
    plain = _run(pruned)
    for unet in (model, pruned):
        unet._load_ip_adapter_weights([{"ip_adapter": ip_adapter, "image_proj": image_proj}])
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 10, generator=generator)]}
    with torch.no_grad(), gated.use(code):
        masked, out = gated(**inputs).sample, pruned(**inputs).sample
    assert _relative(out, masked) < 1e-5 < 1e-3 < _relative(out, plain)
