"""Prune with torch-pruning to given MACs: ``python -m benchmarks.peers.torch_pruning_cut MODEL FOLDER RATIO…``.

For every importance, local and global, and every ratio, the share of channels is found by bisection and the pruned
network saved to FOLDER, where it is not there yet. FOLDER holds ``gradients.safetensors``, the gradients that
kompakt's Taylor scores use too.
The residual streams are left whole where torch-pruning cannot follow them (a shortcut padded with zeros).
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import load_file

from benchmarks.prune_subjects import SUBJECTS, build, example, macs

STEPS = 9
IMPORTANCES = {
    "magnitude-l2": lambda: tp.importance.MagnitudeImportance(p=2, group_reduction="first"),
    "group-norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "group-norm-raw": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "taylor-raw": lambda: tp.importance.GroupTaylorImportance(normalizer=None, group_reduction="sum"),
    "taylor-multivariable": lambda: tp.importance.GroupTaylorImportance(multivariable=True, normalizer=None),
}
SCOPES = {"local": False, "global": True}


def cut(model, inputs, importance: str, scope: str, share: float, ends: tuple[str, ...], gradients: dict):
    """Return a pruned copy."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        parameter.grad = gradients[name].clone()
    ignored = [made.get_submodule(name) for name in ends]
    pruner = tp.pruner.BasePruner(
        made,
        inputs,
        importance=IMPORTANCES[importance](),
        global_pruning=SCOPES[scope],
        pruning_ratio=share,
        max_pruning_ratio=0.9,
        ignored_layers=ignored,
    )
    pruner.step()
    made.zero_grad()
    return made


def to_ratio(name: str, importance: str, scope: str, ratio: float, whole: bool, gradients: dict):
    """Return the largest network with at least ``ratio`` times fewer MACs, or None where there is none.

    A ratio below 1 is the share of the channels that goes.
    """
    model, inputs = build(name), example(name)
    last = "linear" if name == "resnet20" else "fc"
    ends = (last,) if whole else (last, *SUBJECTS[name].ends)
    if ratio < 1:
        return cut(model, inputs, importance, scope, ratio, ends, gradients)
    budget = macs(model, inputs) / ratio
    low, high, best = 0.0, 0.97, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        made = cut(model, inputs, importance, scope, middle, ends, gradients)
        if macs(made, inputs) <= budget:
            high, best = middle, made
        else:
            low = middle
    return best


def main() -> None:
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    gradients = load_file(folder / "gradients.safetensors")
    for ratio in map(float, sys.argv[3:]):
        for importance in IMPORTANCES:
            for scope in SCOPES:
                for whole in (False, True) if name != "resnet20" else (False,):
                    file = folder / f"{importance}-{scope}-{'all' if whole else 'inner'}-{ratio}.pt"
                    if not file.exists():
                        made = to_ratio(name, importance, scope, ratio, whole, gradients)
                        torch.save(made, file)
    print(json.dumps({"version": tp.__version__}))


if __name__ == "__main__":
    main()
