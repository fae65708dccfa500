"""Soft targets and attention by torchdistill: ``python -m benchmarks.peers.torchdistill_train …``.

The same student, teacher, batches, optimizer and learning rates as ``benchmarks.distill`` gives kompakt; torchdistill's
``DistillationBox`` computes the losses and takes the steps. Prints one JSON line. Runs where torchdistill is installed.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox

from benchmarks.distill_cells import SOFT, Bench, Schooling, steps
from benchmarks.prune_subjects import example
from kompakt.build.optimize import learning_rate_at
from kompakt.build.randomness import drawing_from, seeded
from kompakt.build.settings import data_seed
from kompakt.build.taps import inference

OUTPUT = {"is_from_teacher": False, "module_path": ".", "io": "output"}


def criterion(bench: Bench, row: str, student: nn.Module) -> tuple[dict[str, Any], list[str], list[str]]:
    """Say a row's loss in torchdistill's words, with the modules that are to be hooked."""
    goal = bench.objective(row, student)
    if row == "soft targets":
        temperature = SOFT.knobs["temperature"]
        paths = {"student_module_path": ".", "teacher_module_path": ".", "student_module_io": "output"}
        knobs = {**paths, "teacher_module_io": "output", "temperature": temperature, "alpha": goal.task_weight}
        knobs["beta"] = SOFT.weight
        return _sum(kd=({"key": "KDLoss", "kwargs": knobs}, None, 1.0)), [], []
    pairs = {}
    for number, term in enumerate(goal.terms):
        sides = {"teacher": {"io": "output", "path": term.teacher}, "student": {"io": "output", "path": term.student}}
        # torchdistill takes the mean over positions, kompakt the sum.
        pairs[f"pair{number}"] = {**sides, "weight": term.weight * _positions(bench.teacher, str(term.teacher), bench)}
    task = ({"key": "CrossEntropyLoss", "kwargs": {}}, {"key": "SimpleLossWrapper"}, goal.task_weight)
    task[1]["kwargs"] = {"input": OUTPUT, "target": {"uses_label": True}}
    loss = _sum(task=task, at=({"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}}, None, 1.0))
    return loss, [str(term.teacher) for term in goal.terms], [str(term.student) for term in goal.terms]


def _sum(**terms: tuple[dict[str, Any], dict[str, Any] | None, float]) -> dict[str, Any]:
    parts = {
        name: {"criterion": loss, "weight": weight, **({"criterion_wrapper": wrapper} if wrapper else {})}
        for name, (loss, wrapper, weight) in terms.items()
    }
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": parts}}


def _positions(model: nn.Module, name: str, bench: Bench) -> int:
    """Count the positions of a module's output."""
    seen: list[int] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out[0, 0].numel()))
    with inference(model):
        model(example(bench.name))
    handle.remove()
    return seen[0]


def boxed(bench: Bench, row: str, student: nn.Module) -> DistillationBox:
    """Build torchdistill's box for a row."""
    settings = bench.schooling.settings(0)
    loss, theirs, ours = criterion(bench, row, student)
    knobs = {"lr": settings.learning_rate, "momentum": settings.momentum, "nesterov": True}
    config = {
        "num_epochs": settings.epochs,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "requires_grad": False,
            "forward_hook": {"input": [], "output": theirs},
        },
        "student": {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": ours}},
        "optimizer": {"key": "SGD", "kwargs": {**knobs, "weight_decay": settings.weight_decay}},
        "criterion": loss,
    }
    teacher = copy.deepcopy(bench.teacher).to(memory_format=torch.channels_last)
    student.to(memory_format=torch.channels_last)
    box = DistillationBox(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    return box


def stepper(box: DistillationBox) -> Callable[[Tensor, Tensor], None]:
    """Return one training step."""

    def step(inputs: Tensor, labels: Tensor) -> None:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        box.post_forward_process(loss=box.forward_process(inputs, labels))

    return step


def trained(bench: Bench, row: str, seed: int) -> dict[str, Any]:
    """Train a student by torchdistill and score it as kompakt's are scored."""
    student, loader, settings = bench.student("random", seed), bench.loader(seed), bench.schooling.settings(seed)
    box = boxed(bench, row, student)
    step, count, begun = stepper(box), 0, time.perf_counter()
    for epoch in range(settings.epochs):
        student.train()
        with drawing_from(seeded(data_seed(seed, epoch))):
            for inputs, labels in loader.batches(epoch):
                for group in box.optimizer.param_groups:
                    group["lr"] = learning_rate_at(settings, count, loader.steps * settings.epochs)
                step(inputs, labels)
                count += 1
    spent = time.perf_counter() - begun
    box.clean_modules()
    student.to(memory_format=torch.contiguous_format)
    return {"train_s": spent, **bench.judged(student, f"torchdistill-{row}-{seed}".replace(" ", "_"))}


def main() -> int:
    """Train one cell, or time steps beside kompakt's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("row", help="soft targets, attention or steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--cifar", default="/tmp/data")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    schooling = Schooling(images=given.images, epochs=given.epochs)
    bench = Bench(name=given.model, cifar=given.cifar, schooling=schooling)
    if given.row == "steps":
        batch = next(iter(bench.loader(0).batches(0)))
        rows = ("soft targets", "attention")
        boxes = {f"{row}, torchdistill": stepper(boxed(bench, row, bench.student("random", 0))) for row in rows}
        found = steps(bench, {name: partial(step, *batch) for name, step in boxes.items()}, given.seconds)
    else:
        found = trained(bench, given.row, given.seed)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
