"""Ablation in rounds: what costs least is closed, then what is left is measured again, down to the sizes that are wanted.

One measurement on the whole teacher says what an entry is worth beside all others. At half of the demo's MACs a code made by
it alone misses the teacher's output by .100 of its power; measured again at three sizes on the way down, by .024. That is before
fine-tuning: after it the first ended at a squared error of .0031, the second at .0042 (one seed), so one is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aptp_ray.core.baselines import ablation_greedy
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel


@dataclass(frozen=True)
class AblationPath:
    """Where importances were measured, and the codes that follow from them.

    Attributes:
        macs: the MACs of the teacher's codes.
        codes: bool [dim] each, largest first; the first is the whole teacher. Each is part of the one before it.
        importances: measured under each of the codes.
        alignment: channel counts of the codes become multiples of this.
        tolerance: largest relative distance of a code from its size.
    """

    macs: MacsModel
    codes: tuple[Tensor, ...]
    importances: tuple[Importance, ...]
    alignment: int = 8
    tolerance: float = 0.005

    def code(self, ratio: float) -> Tensor:
        """Returns the code bool [dim] of a size: of the measured one next above it, without what cost least there.

        Args:
            ratio: its MACs over the teacher's.

        Raises:
            ValueError: if the size is out of reach.
        """
        sizes = [float(self.macs.ratio(code[None].double())[0]) for code in self.codes]
        at = max(index for index, size in enumerate(sizes) if index == 0 or size >= ratio * (1 - self.tolerance))
        if at and sizes[at] <= ratio * (1 + self.tolerance):
            return self.codes[at]
        return ablation_greedy(
            self.macs.space,
            self.macs,
            ratio,
            importance=self.importances[at],
            alignment=self.alignment,
            tolerance=self.tolerance,
        )


def ablate(
    macs: MacsModel,
    measure: Callable[[Tensor, int], Importance],
    sizes: Sequence[float],
    *,
    alignment: int = 8,
    tolerance: float = 0.005,
) -> AblationPath:
    """Measures importances on the whole teacher, and again at each size on the way down.

    Args:
        macs: the MACs of the teacher's codes.
        measure: (code, how many measurements came before) -> `measure_importance` under it; the first code is the whole teacher.
        sizes: MACs ratios at which to measure again, in any order; the way ends before one that is out of reach.
        alignment: channel counts of the codes become multiples of this.
        tolerance: largest relative distance of a code from its size.
    """
    teacher = macs.space.full_code()
    path = AblationPath(macs, (teacher,), (measure(teacher, 0),), alignment, tolerance)
    for size in sorted(sizes, reverse=True):
        try:
            code = path.code(size)
        except ValueError:
            break
        path = replace(
            path, codes=(*path.codes, code), importances=(*path.importances, measure(code, len(path.codes)))
        )
    return path
