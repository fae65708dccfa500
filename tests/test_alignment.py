"""The multiple that a runtime likes is found from times alone."""

from collections.abc import Sequence
from math import ceil

import pytest
import torch
from torch import nn

from kompakt.alignment import alignment
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.trace import trace
from kompakt.methods.latency import Case


def coupled(width: int = 64) -> Coupling:
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(16 * width, 10)
    )
    return couple(trace(model.eval(), torch.zeros(2, 3, 8, 8)).graph)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_blocks_of_kernels_are_found(block: int) -> None:
    def times(cases: Sequence[Case]) -> dict[Case, float]:
        return {case: float(ceil(case.weight[0] / block) * block) for case in cases}

    assert alignment(coupled(), times) == block


def test_layers_too_narrow_to_tell_leave_widths_as_they_are() -> None:
    assert alignment(coupled(8), lambda cases: pytest.fail("nothing to time")) == 1
