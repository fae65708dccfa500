"""The one training loop: fine-tuning, quantization-aware and sparse training, distillation.

The loop is ours; devices, processes and trackers are ``accelerate``'s. Under ``torchrun`` every
process takes its share of every global batch, so that any number of processes trains alike.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, is_tensorboard_available
from torch import nn

from kompakt.build.distill import Objective, Student, Teacher, Term, stage_terms
from kompakt.build.evaluate import Evaluation, evaluate, reestimate_bn
from kompakt.build.randomness import drawing_from, seeded
from kompakt.build.run import Run
from kompakt.build.settings import (
    Batch,
    EpochRecord,
    Hooks,
    Loader,
    Regularizer,
    TrainReport,
    TrainSettings,
    data_seed,
    shuffled,
)
from kompakt.build.shard import whole
from kompakt.errors import InputError, MissingExtraError

__all__ = [
    "EpochRecord",
    "Evaluation",
    "Hooks",
    "Loader",
    "Objective",
    "Teacher",
    "Term",
    "TrainReport",
    "TrainSettings",
    "evaluate",
    "reestimate_bn",
    "shuffled",
    "stage_terms",
    "train",
]


def train(
    model: nn.Module,
    loader: Loader,
    settings: TrainSettings,
    *,
    objective: Objective = Objective(),
    teachers: tuple[Teacher, ...] = (),
    regularizers: tuple[Regularizer, ...] = (),
    hooks: Hooks = Hooks(),
) -> TrainReport:
    """Train ``model`` in place (deep-copy it first to keep the old weights) and report every epoch.

    The loss is ``task_weight · task + Σ weight · distillation + Σ regularizer(model)``. The weights that
    come out depend on the model, the data, the settings and the number of threads alone; the caller's
    random state and the model's device and modes are as they were afterwards.

    Args:
        model: float32; on several processes it must be the same on all.
        loader: the same batches for the same epoch, every time.
        objective: distillation terms; they need ``teachers``.
        regularizers: model → scalar, added to the loss.

    Raises:
        InputError: a tap, a shape, a label or the checkpoint folder does not fit.
        ModelError: a loss or a weight is not finite; the last good checkpoint stays.
    """
    if teachers and not objective.terms:
        raise InputError(
            "a teacher was given, but the objective has no distillation term; add one, such as soft_targets"
        )
    accelerator = _accelerator(hooks, settings)
    trained = copy.deepcopy(model) if settings.shard else model
    modules = [teacher.model for teacher in teachers if isinstance(teacher.model, nn.Module)]
    modules += [] if settings.shard else [trained]  # what is sharded is moved part by part
    with drawing_from(seeded(settings.seed + accelerator.process_index)), ExitStack() as stack:
        student = Student(trained, objective, teachers)
        for module in modules:
            stack.enter_context(_placed(module, accelerator.device, settings.channels_last))
        with drawing_from(seeded(data_seed(settings.seed, 0))):
            inputs, labels = (x.to(accelerator.device) for x in _first_batch(loader))
        student.add_projections(teachers, inputs)
        run = Run(student, loader, settings, teachers, regularizers, hooks, accelerator)
        run.rehearse(inputs, labels)
        run.go()
        if settings.shard:
            model.load_state_dict(whole(trained.state_dict()))
    if hooks.tensorboard is not None:
        accelerator.end_training()
    return TrainReport(history=tuple(run.history), steps=run.step, resumed_at=run.resumed_at)


def _accelerator(hooks: Hooks, settings: TrainSettings) -> Accelerator:
    if hooks.tensorboard is not None and not is_tensorboard_available():
        raise MissingExtraError("TensorBoard is not installed; try: pip install tensorboard")
    # Without cpu=True, accelerate takes every process of torchrun for a run of its own where there is no GPU.
    cpu = None if torch.accelerator.is_available() else True
    # The graph of a run does not change; said so, DDP bears parameters that no loss uses.
    fixed = DistributedDataParallelKwargs(static_graph=True)
    tracker = {} if hooks.tensorboard is None else {"log_with": "tensorboard", "project_dir": hooks.tensorboard}
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[fixed], **tracker)
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise InputError(
            f"training under accelerate's {accelerator.distributed_type.value} is not supported; start the processes "
            "with torchrun, and set shard where the model is larger than one device"
        )
    if settings.shard and accelerator.num_processes == 1:
        raise InputError("shard: there is one process, nothing to split between; start several with torchrun")
    if tracker:
        accelerator.init_trackers("kompakt")
    return accelerator


@contextmanager
def _placed(model: nn.Module, device: torch.device, channels_last: bool) -> Iterator[None]:
    """Move a module to the run's device and memory format for a block, and give it its own back after it."""
    home = next((p.device for p in model.parameters()), device)
    modes = [(module, module.training) for module in model.modules()]
    images = [p for p in model.parameters() if p.ndim == 4]
    relaid = channels_last and any(p.is_contiguous() for p in images)
    model.to(device)
    if relaid:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(home)
        if relaid:
            model.to(memory_format=torch.contiguous_format)
        for module, training in modes:
            module.training = training


def _first_batch(loader: Loader) -> Batch:
    """Return the first batch of the first epoch.

    Raises:
        InputError: there is none.
    """
    for batch in loader.batches(0):
        return batch
    raise InputError("the data give no batch: nothing to train on")
