"""Tabular data and a score of your own: a tumour classifier, made smaller under a budget of costs, not of errors.

``python -m examples.tabular`` trains a small network on scikit-learn's breast cancer table (569 rows, 30 columns) and
writes ``tabular.safetensors``. Three callables, named by reference, serve every command: model, loaders and score::

    kompakt compress examples/tabular.py:network --weights tabular.safetensors --data examples/tabular.py:tables \\
        --metric examples/tabular.py:worth --max-drop 1.0 --out compressed

With ``--effort MINUTES`` pruning, training and bits are searched together.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kompakt.weights import save_weights

MALIGNANT = 0
MISSED = 5.0
"""A tumour that is taken for harmless costs as much as five that are taken for malignant."""
COLUMNS, WIDTH, EPOCHS, RATE = 30, 256, 60, 2e-3
TEST, VALIDATION = 200, 100


def network() -> nn.Module:
    """Build the classifier."""
    return nn.Sequential(nn.Linear(COLUMNS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def tables() -> dict[str, DataLoader]:
    """Split the rows and bring every column to mean 0 and deviation 1, as seen in training."""
    found = load_breast_cancer()
    inputs, labels = torch.from_numpy(found.data).float(), torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, validation, train = order.split((TEST, VALIDATION, len(labels) - TEST - VALIDATION))
    mean, deviation = inputs[train].mean(dim=0), inputs[train].std(dim=0)
    inputs = (inputs - mean) / deviation
    parts = {"train": train, "validation": validation, "test": test}
    return {name: DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=32) for name, rows in parts.items()}


def worth(outputs: Tensor, labels: Tensor) -> Tensor:
    """Score every row, larger is better: 1 where right, 0 for a false alarm, ``1 - MISSED`` for a missed tumour.

    Args:
        outputs: of the network, N×2.
        labels: N, 0 is malignant.
    """
    right = outputs.argmax(dim=1) == labels
    cost = torch.where(labels == MALIGNANT, MISSED, 1.0)
    return torch.where(right, 1.0, 1.0 - cost)


def train(model: nn.Module, loader: DataLoader) -> nn.Module:
    """Train with the costs as weights of the classes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels, weight=torch.tensor([MISSED, 1.0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Train and save; print the command that compresses what was saved."""
    parser = argparse.ArgumentParser(prog="python -m examples.tabular")
    parser.add_argument("--weights", type=Path, default=Path("tabular.safetensors"), help="the file to write")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    save_weights(train(network(), tables()["train"]), given.weights)
    here = "examples/tabular.py"
    print(
        f"kompakt compress {here}:network --weights {given.weights} --data {here}:tables --metric {here}:worth "
        "--max-drop 1.0 --out compressed"
    )


if __name__ == "__main__":
    main()
