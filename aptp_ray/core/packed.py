"""Linear layers of few rows on a CPU: weights in oneDNN's own order, so that a short text costs little more than reading them.

torch multiplies float32 on CPUs by MKL, which takes 8 to 10 ms for the linear layers of MiniLM and one prompt on one core;
oneDNN with weights laid out for it takes 4 to 5, and reading the weights 2 (measured).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

# Rows that the layout is chosen for; any number is right with it.
_ROWS = 16


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` with its weight in oneDNN's layout.

    The operators are those that torch.compile calls when weights are frozen
    (``torch._inductor.fx_passes.mkldnn_fusion``); oneDNN has no public door for a single layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Multiplies [..., in] to [..., out]."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], ""))


def can_pack(model: nn.Module) -> bool:
    """Whether the model's linear layers can run packed: float32 on a CPU, by a torch with oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


def pack_linears(model: nn.Module) -> None:
    """Replaces every linear layer of a frozen model; its state dict loses their weights."""
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, PackedLinear(child))
        else:
            pack_linears(child)
