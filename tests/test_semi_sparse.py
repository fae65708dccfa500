"""2:4 on sparse tensor cores: the same outputs where there is such a GPU, one clear line where there is none."""

import pytest
import torch

from kompakt.errors import MissingExtraError
from kompakt.measure import semi_sparse as module
from kompakt.measure.semi_sparse import semi_sparse, unavailable


def test_outputs_are_those_of_the_dense_product() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    found = semi_sparse(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), 256, seconds=1.0)
    assert found.error < 1e-2


def test_a_machine_without_such_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingExtraError, match="no NVIDIA GPU"):
        semi_sparse(torch.zeros(64, 64), 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "Tesla T4 has none" in str(module.unavailable())
