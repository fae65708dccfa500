"""The example that reproduces Deep Compression: its counts are those of the paper's format."""

import numpy as np
import pytest
import torch

from examples.deep_compression import mean_of
from examples.deep_page import picked_row
from examples.deep_stages import DENSITY, clustered, coded_bits, cut, relative, sizes
from kompakt.models import load_model
from kompakt.training import keeper


@pytest.fixture(scope="module")
def pruned() -> torch.nn.Module:
    torch.manual_seed(0)
    model = load_model("kompakt.zoo:lenet300")
    keeper(cut(model, "lenet300"))(model, 0)
    return model


@pytest.mark.parametrize("width", [2, 5])
def test_gaps_and_fillers_lead_to_every_weight(width: int) -> None:
    rng = np.random.default_rng(width)
    flat = rng.normal(0, 1, 4000).round(1).astype(np.float32) * (rng.random(4000) < 0.05)
    gaps, indices, values = relative(flat, width)
    places = np.cumsum(gaps + 1) - 1
    back = np.zeros_like(flat)
    back[places] = np.append(0, np.unique(flat[flat != 0]))[indices]
    assert np.array_equal(back, flat)
    assert gaps.max() < 2**width
    assert values == np.unique(flat[flat != 0]).size


def test_as_many_weights_stay_as_in_the_paper(pruned: torch.nn.Module) -> None:
    tensors = dict(pruned.named_parameters())
    for layer, kept in DENSITY["lenet300"].items():
        assert float((tensors[layer] != 0).float().mean()) == pytest.approx(kept, abs=1e-3)


def test_clusters_share_their_mean_and_zeros_stay(pruned: torch.nn.Module) -> None:
    books = clustered(pruned, "lenet300")
    zeros = {name: p == 0 for name, p in pruned.named_parameters() if name in books}
    mean_of(books)(pruned, 0)
    for name, weight in pruned.named_parameters():
        if name in books:
            assert weight.unique().numel() <= 2 ** books[name][1]
            assert bool((weight[zeros[name]] == 0).all())
            first = weight[books[name][0] == 1].unique()
            assert first.numel() == 1
    counted = sizes(pruned, {name: bits for name, (_, bits) in books.items()})
    assert counted["huffman"] < counted["share"] < counted["prune"] < 4 * 266_610 / 8


def test_huffman_is_between_the_entropy_and_one_bit_more() -> None:
    symbols = np.random.default_rng(0).geometric(0.3, 20000) - 1
    share = np.bincount(symbols) / symbols.size
    entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
    assert entropy * symbols.size <= coded_bits(symbols) <= (entropy + 1) * symbols.size


def test_the_smallest_file_within_the_margin_is_picked_on_validation() -> None:
    rows = [
        {"stage": "rate", "kpk_bytes": size, "validation_drop": drop, "drop": 9.0}
        for size, drop in ((900, 0.0), (700, 0.1), (500, 0.2))
    ]
    found = picked_row({"rows": [{"stage": "float"}, *rows]}, 0.1)
    assert found is not None
    assert found["kpk_bytes"] == 700
    assert picked_row({"rows": rows[2:]}, 0.1) is None
