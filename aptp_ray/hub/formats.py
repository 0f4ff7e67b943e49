"""One expert as a program: torch.export's archive or an ONNX graph, checked against the model that it was made of.

A program is one call of the denoising model: ``sample`` [batch, channels, height, width], ``timestep`` [batch] and
``encoder_hidden_states`` [batch, tokens, width] to ``prediction``. The batch is free, the other sizes are the run's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, UserError
from aptp_ray.core.components import load_text, load_unet
from aptp_ray.storage import replacing_folder

Program = Literal["pt2", "onnx"]

# diffusers copies activations of 64 rows and more before it upsamples them: a program of either kind of batch is not of both.
_MOST_ROWS = 63
_TRACED_ROWS, _CHECKED_ROWS = 2, 3
# Largest difference over the largest value, of float32 sums in another order; of half precision, its own rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_INPUTS = ("sample", "timestep", "encoder_hidden_states")


class ParityError(UserError, RuntimeError):
    """A program that puts out something else than the model it was made of."""


@dataclass(frozen=True)
class Shapes:
    """What a program takes; the batch is left out.

    Attributes:
        sample: (channels, height, width).
        text: (tokens, width).
    """

    sample: tuple[int, int, int]
    text: tuple[int, int]

    @classmethod
    def of(cls, run: RunDir, config: Config, model: Any) -> Shapes:
        """Reads them from a run: latents at its resolution, texts as its teacher encodes them."""
        vae = run.read_json("teacher", "vae", "config.json")
        side = config.data.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
        text = load_text(run.local("teacher"), models=False).shape
        return cls((int(model.config["in_channels"]), side, side), text)

    def inputs(self, rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws inputs."""
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(rows, *self.sample, generator=generator).to(dtype),
            torch.linspace(1, 999, rows),
            torch.randn(rows, *self.text, generator=generator).to(dtype),
        )


class _Call(nn.Module):
    """A model as a function of three tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]


def export_program(
    run: RunDir, config: Config, expert: int, target: str | Path, kind: Program, *, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Writes ``expert.pt2`` or ``expert.onnx`` (its weights beside it), and ``program.json``, into a folder; replaces one.

    Args:
        run: a run directory whose fine-tuning has finished.
        config: of the run.
        expert: its id.
        target: the folder.
        kind: "pt2": ``torch.export.load(file).module()`` calls it, and AOTInductor compiles it. "onnx": needs the extra ``onnx``.
        dtype: of weights and activations.

    Returns:
        ``{"folder", "experts", "bytes", "parity"}``; the parity is the largest difference over the largest value.

    Raises:
        RunDirError: if the expert is not there.
        UserError: if the packages that ONNX takes are not installed, or it is asked for bfloat16.
        ParityError: if the program puts out something else.
    """
    if kind == "onnx":
        require_onnx()
        if dtype == torch.bfloat16:
            raise UserError("numpy, through which an ONNX program is checked, has no bfloat16: use --dtype fp32 or fp16")
    model = load_unet(run.local("experts", str(expert)), dtype=dtype)
    shapes = Shapes.of(run, config, model)
    with replacing_folder(Path(target)) as folder:
        parity = write_program(model, shapes, folder / f"expert.{kind}", kind)
        facts = {"kind": kind, "run": config.name, "expert": expert, "dtype": str(dtype).removeprefix("torch."), "parity": parity}
        facts |= {"rows": [1, _MOST_ROWS], "shapes": asdict(shapes), "torch": torch.__version__}
        (folder / "program.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in Path(target).iterdir())
    return {"folder": str(target), "experts": [expert], "bytes": size, "parity": parity}


@torch.no_grad()
def write_program(model: nn.Module, shapes: Shapes, file: Path, kind: Program) -> float:
    """Writes a model as a program, and compares the two on a batch of another size than the one that was traced.

    Args:
        model: as ``load_unet`` returns it, in evaluation mode.
        shapes: of its inputs.
        file: to write.
        kind: of program.

    Returns:
        The largest difference over the largest value.

    Raises:
        ParityError: if it is more than rounding.
    """
    call, dtype = _Call(model), next(model.parameters()).dtype
    rows = torch.export.Dim("rows", min=1, max=_MOST_ROWS)
    program = torch.export.export(
        call, shapes.inputs(_TRACED_ROWS, dtype, seed=0), dynamic_shapes=dict.fromkeys(_INPUTS, {0: rows}), strict=False
    )
    inputs = shapes.inputs(_CHECKED_ROWS, dtype, seed=1)
    if kind == "pt2":
        torch.export.save(program, file)
        found = torch.export.load(file).module()(*inputs)
    else:
        _write_onnx(program, file)
        found = _run_onnx(file, inputs)
    expected = call(*inputs)
    parity = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not parity <= _TOLERANCE[dtype]:
        raise ParityError(
            f"{file.name} differs from its model by {parity:.2g} of the largest value, more than {_TOLERANCE[dtype]:g} for "
            f"{dtype}: this combination of versions exports it wrongly; try --format diffusers or another torch"
        )
    return parity


def require_onnx() -> None:
    """Refuses to go on without the packages that ONNX takes.

    Raises:
        UserError: naming the extra.
    """
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"an ONNX export needs {', '.join(missing)}: pip install 'aptp-ray[onnx]', or use --format pt2")


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    # PixArt squeezes a dimension that is larger than 1: nothing happens in torch, and ONNX refuses.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim and node.meta["val"].ndim == node.args[0].meta["val"].ndim:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    exported: Any = torch.onnx.export(
        program, dynamo=True, input_names=list(_INPUTS), output_names=["prediction"], verbose=False
    )
    exported.save(str(file), external_data=True)  # protobuf ends at two gigabytes


def _run_onnx(file: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in zip(_INPUTS, inputs, strict=True)}
    return torch.from_numpy(session.run(["prediction"], given)[0])
