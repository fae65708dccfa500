"""The state of a training run and its steps: what ``kompakt.build.train`` drives."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from kompakt.build.checkpoint import FILE, load_checkpoint, save_checkpoint
from kompakt.build.distill import Student, Teacher, distillation_losses, teacher_features, term_names
from kompakt.build.optimize import average_into, learning_rate_at, make_optimizer
from kompakt.build.randomness import current, drawing_from, resume, seeded
from kompakt.build.settings import Batch, EpochRecord, Hooks, Loader, Regularizer, TrainSettings, data_seed
from kompakt.build.shard import load_model, load_optimizer, local, shard, whole
from kompakt.build.taps import inference, set_mode
from kompakt.errors import InputError, ModelError
from kompakt.progress import track


class Run:
    """The state of one run: where it stands, and what it has summed up in the current epoch.

    ``step`` counts steps of the whole run; the current epoch is the one after the last recorded.
    """

    def __init__(
        self,
        student: Student,
        loader: Loader,
        settings: TrainSettings,
        teachers: tuple[Teacher, ...],
        regularizers: tuple[Regularizer, ...],
        hooks: Hooks,
        accelerator: Accelerator,
    ):
        self.student, self.loader, self.settings, self.teachers = student, loader, settings, teachers
        self.regularizers, self.hooks, self.accelerator = regularizers, hooks, accelerator
        self.names = ("task", *term_names(student.objective), *(("regularizer",) if regularizers else ()))
        self.identity = {**settings.identity(), "steps": loader.steps, "objective": repr(student.objective)}
        self.wrapped, self.optimizer = self._prepared()
        self.compiled = (
            cast(nn.Module, torch.compile(self.wrapped, dynamic=False)) if settings.compile else self.wrapped
        )
        self.usual: torch.Size | None = None  # the shape of inputs that the step is compiled for
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if settings.ema else {}
        self.history: list[EpochRecord] = []
        self.step = self.resumed_at = 0
        self._open_epoch()

    def _prepared(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the student as it is called, and its optimizer: of DDP, of FSDP or of one process."""
        if self.settings.shard:
            shard(self.student, self.accelerator.device, self.accelerator.num_processes)
            return self.student, make_optimizer(self.student, self.settings)
        return self.accelerator.prepare(self.student, make_optimizer(self.student, self.settings))

    def rehearse(self, inputs: Tensor, labels: Tensor) -> None:
        """Compute the losses once without training, so that what does not fit is said before anything changes."""
        with inference(self.student):
            self._losses(self.student, inputs, labels)

    def go(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self._restore()
        for hook in self.hooks.after_step:
            hook(self.student.model, self.step)
        while len(self.history) < self.settings.epochs:
            self._epoch()
        self.optimizer.zero_grad()
        if self.average:
            self.student.load_state_dict(self.average)

    def _open_epoch(self) -> None:
        self.sums = torch.zeros(len(self.names) + 3, dtype=torch.float64)  # loss, losses…, right answers, samples
        self.spent_s = 0.0

    def _epoch(self) -> None:
        epoch, start = len(self.history), time.perf_counter() - self.spent_s
        training_mode(self.student, self.settings.freeze_bn)
        left = (epoch + 1) * self.loader.steps - self.step
        loss = f", loss {self.history[-1].loss:.3f}" if self.history else ""
        show = self.hooks.progress and self.accelerator.is_main_process
        for inputs, labels in track(
            self._remaining(epoch), left, f"epoch {epoch + 1}/{self.settings.epochs}{loss}", show=show
        ):
            self._train_step(inputs, labels)
            self.spent_s = time.perf_counter() - start
            if self.settings.checkpoint_every and self.step % self.settings.checkpoint_every == 0:
                self._save()
        if (seen := self.step - epoch * self.loader.steps) < self.loader.steps:
            raise InputError(f"data: epoch {epoch} gave {seen} batches, {self.loader.steps} were announced")
        self._close_epoch(start)

    def _remaining(self, epoch: int) -> Iterator[Batch]:
        """Yield the epoch's batches after those that a resumed run has done already.

        The data draw from a stream of their own that depends on seed and epoch alone: it is the same on all
        processes and, once the batches that were done are drawn again, in a resumed run.
        """
        done = self.step - epoch * self.loader.steps
        stream = seeded(data_seed(self.settings.seed, epoch))
        batches = None
        for number in range(self.loader.steps):
            with drawing_from(stream):
                batches = batches or iter(self.loader.batches(epoch))
                batch = next(batches, None)
            if batch is None:
                return
            if number >= done:
                yield batch

    def _train_step(self, inputs: Tensor, labels: Tensor) -> None:
        inputs, labels, share = self._share(inputs, labels)
        epoch = self.step / self.loader.steps
        rate = learning_rate_at(self.settings, self.step, self.loader.steps * self.settings.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.usual = self.usual or inputs.shape
        student = self.compiled if inputs.shape == self.usual else self.wrapped
        output, losses = self._losses(student, inputs, labels)
        weights = self.student.objective.weights_at(epoch, self.settings.epochs)
        data_loss = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
        if self.regularizers:
            terms = [term(self.student.model) for term in self.regularizers]
            losses.append(torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in terms]).sum())
        regularization = losses[-1] if self.regularizers else data_loss.new_zeros(())
        self._check_losses(data_loss + regularization, losses)
        self._descend(share * data_loss + regularization)
        self._count([data_loss + regularization, *losses], output, labels, share)

    def _losses(self, student: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Any, list[Tensor]]:
        """Return the model's output, and the losses of the task and of every term."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            theirs = [teacher_features(teacher, self.student.terms, inputs) for teacher in self.teachers]
            output, ours = student(inputs)
        task = self._task(output, labels)
        return output, [task, *distillation_losses(self.student.terms, self.teachers, theirs, ours, labels)]

    def _share(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return this process's part of a global batch, and the factor that keeps the mean gradient the batch's.

        A process without a sample computes the first one with factor 0, since all have to take part.
        """
        world, rank, size = self.accelerator.num_processes, self.accelerator.process_index, len(inputs)
        part = slice(rank, None, world) if rank < size else slice(0, 1)
        device = self.accelerator.device
        inputs, labels = inputs[part].to(device), labels[part].to(device)
        if self.settings.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, labels, len(inputs) * world / size if rank < size else 0.0

    def _task(self, output: Any, labels: Tensor) -> Tensor:
        if self.hooks.task_loss is not None:
            return self.hooks.task_loss(output, labels)
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise InputError(f"the model returns {type(output).__name__}, not logits (N, K): give hooks.task_loss")
        if (highest := int(labels.max())) >= output.shape[1]:
            raise InputError(
                f"label {highest} in the data, but the model has {output.shape[1]} classes (0 is the first)"
            )
        return F.cross_entropy(output.float(), labels, label_smoothing=self.settings.label_smoothing)

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.step += 1
        for hook in self.hooks.after_step:
            hook(self.student.model, self.step)
        if self.settings.ema:
            average_into(self.average, self.student, self.settings.ema, self.step)

    def _count(self, losses: list[Tensor], output: Any, labels: Tensor, share: float) -> None:
        samples = len(labels) if share else 0
        right = float("nan")
        if isinstance(output, Tensor) and output.ndim == 2 and not labels.is_floating_point():
            right = float((output.argmax(dim=1) == labels).sum()) if samples else 0.0
        values = torch.stack([loss.detach() for loss in losses]).double().cpu()
        self.sums += torch.cat([values * samples, torch.tensor([right, samples], dtype=torch.float64)])

    def _check_losses(self, total: Tensor, losses: list[Tensor]) -> None:
        if not torch.isfinite(total):
            total, losses = total.detach(), [loss.detach() for loss in losses]
            parts = ", ".join(f"{name} {float(loss):.4g}" for name, loss in zip(self.names, losses, strict=True))
            raise ModelError(
                f"step {self.step} (epoch {len(self.history)}): the loss is {float(total)} ({parts}); {self._advice()}"
            )

    def _check_weights(self) -> None:
        for name, value in self.student.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(local(value)).all():
                raise ModelError(f"step {self.step}: {name} is no longer finite; {self._advice()}")

    def _advice(self) -> str:
        folder = self.settings.checkpoint
        kept = f"; the checkpoint in {folder} is from before" if folder and (folder / FILE).exists() else ""
        return f"lower the learning rate ({self.settings.learning_rate}) or set clip_norm{kept}"

    def _close_epoch(self, start: float) -> None:
        self._check_weights()
        sums = self.accelerator.reduce(self.sums.to(self.accelerator.device), reduction="sum").cpu()
        *losses, right, samples = (float(value) for value in sums)
        total, *losses = (loss / samples for loss in losses)
        score = None
        if self.hooks.validate is not None:
            with inference(self.student.model):
                score = float(self.hooks.validate(self.student.model))
        record = EpochRecord(
            epoch=len(self.history),
            loss=total,
            losses=dict(zip(self.names, losses, strict=True)),
            accuracy=right / samples if right == right else None,
            validation=score,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - start,
        )
        self.history.append(record)
        self._open_epoch()
        self._save()
        if self.hooks.log is not None and self.accelerator.is_main_process:
            self.hooks.log(record)
        if self.hooks.tensorboard is not None:
            self.accelerator.log(record.scalars(), step=self.step)

    def _save(self) -> None:
        """Write the checkpoint: one process does, with the random states of all."""
        if self.settings.checkpoint is None:
            return
        self._check_weights()
        rng = gather_object([current()])
        sums = self.accelerator.reduce(self.sums.to(self.accelerator.device), reduction="sum").cpu()
        model, optimizer = whole(self.student.state_dict()), whole(self.optimizer.state_dict())
        if self.accelerator.is_main_process:
            state = {
                "model": model,
                "optimizer": optimizer,
                "average": self.average,
                "rng": rng,
                "step": self.step,
                "sums": sums,
                "spent_s": self.spent_s,
                "history": [asdict(record) for record in self.history],
            }
            save_checkpoint(self.settings.checkpoint, state, self.identity)

    def _restore(self) -> None:
        folder = self.settings.checkpoint
        state = load_checkpoint(folder, self.identity) if folder is not None else None
        if state is None:
            return
        try:
            load_model(self.student, state["model"])
        except RuntimeError as error:
            raise InputError(
                f"{folder}: the checkpoint is of another model; take another folder, or delete it"
            ) from error
        load_optimizer(self.optimizer, state["optimizer"])
        self.average = {name: value.to(self.accelerator.device) for name, value in state["average"].items()}
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.step = self.resumed_at = state["step"]
        self.spent_s = state["spent_s"]
        if self.accelerator.is_main_process:
            self.sums = state["sums"]
        rank = self.accelerator.process_index
        if len(state["rng"]) != self.accelerator.num_processes:
            raise InputError(
                f"{folder}: written by {len(state['rng'])} processes, now there are {self.accelerator.num_processes}"
            )
        resume(state["rng"][rank])


def training_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Set training mode, with batch norms in inference mode where they are frozen."""
    set_mode(model, True)
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
