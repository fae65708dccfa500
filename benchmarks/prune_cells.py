"""What one cell of ``python -m benchmarks.prune`` does: make a pruned network, mend, score, train and time it."""

import base64
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.prune_subjects import BN_EXAMPLES, SUBJECTS, build, example, fused, macs
from kompakt.alignment import alignment
from kompakt.allotment import Timing
from kompakt.artifact.onnx import export_onnx
from kompakt.artifact.targets import target
from kompakt.augment import crop_and_flip
from kompakt.build.distill import stage_terms
from kompakt.build.evaluate import evaluate, reestimate_bn
from kompakt.build.prune import apply_prune
from kompakt.build.reconstruct import reconstruct
from kompakt.build.train import Hooks, Objective, Teacher, Term, TrainSettings, shuffled, train
from kompakt.data import Data, Split, open_data
from kompakt.evidence import gradients
from kompakt.graph.coupling import Coupling, couple
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.measure.latency import interleave
from kompakt.methods.channels import Knobs, channels
from kompakt.methods.scores import Scoring, unit_scores
from kompakt.methods.sensitivity import measured_drops
from kompakt.plan.plan import Plan
from kompakt.teachers import onnx_teacher

BATCH = 100
RECONSTRUCT_EXAMPLES = 256
SENSITIVITY_EXAMPLES = 256
SHARES = (0.2, 0.4, 0.6, 0.8)
LOSS_UNITS = {"normalisation": "none", "reduction": "sum"}
OURS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "uniform-l2-inner": ("uniform", {"criterion": "l2"}, "inner", True),
    "uniform-l2-unfolded-inner": ("uniform", {"criterion": "l2", "folded": False}, "inner", True),
    "global-l2-unfolded-inner": ("global", {"criterion": "l2", "folded": False}, "inner", True),
    "uniform-l2-all": ("uniform", {"criterion": "l2"}, "all", True),
    "uniform-l2-unfolded-all": ("uniform", {"criterion": "l2", "folded": False}, "all", True),
    "uniform-geometric_median-inner": ("uniform", {"criterion": "geometric_median"}, "inner", True),
    "uniform-bn_scale-inner": ("uniform", {"criterion": "bn_scale"}, "inner", True),
    "uniform-taylor-inner": ("uniform", {"criterion": "taylor"}, "inner", True),
    "global-l2-inner": ("global", {"criterion": "l2"}, "inner", True),
    "global-taylor-inner": ("global", {"criterion": "taylor", **LOSS_UNITS}, "inner", True),
    "global-taylor_sum_abs-inner": ("global", {"criterion": "taylor_sum_abs", **LOSS_UNITS}, "inner", True),
    "knapsack-taylor_sum_abs-inner": ("knapsack", {"criterion": "taylor_sum_abs", **LOSS_UNITS}, "inner", True),
    "knapsack-taylor_sum_abs-all": ("knapsack", {"criterion": "taylor_sum_abs", **LOSS_UNITS}, "all", True),
    "sensitivity-l2-inner": ("sensitivity", {"criterion": "l2"}, "inner", True),
    "sensitivity-l2-all": ("sensitivity", {"criterion": "l2"}, "all", True),
    "sensitivity-taylor_sum_abs-inner": ("sensitivity", {"criterion": "taylor_sum_abs", **LOSS_UNITS}, "inner", True),
    "sensitivity-taylor_sum_abs-all": ("sensitivity", {"criterion": "taylor_sum_abs", **LOSS_UNITS}, "all", True),
    "uniform-random-inner": ("uniform", {"criterion": "random"}, "inner", False),
}
"""Setting → allocation, scoring, which channels may go, and whether it can be chosen (the control cannot)."""


class TimeUp(Exception):
    """The time that was given is used up."""


@dataclass(kw_only=True)
class Bench:
    """One network with its data, its coupling and the folder where pruned networks lie."""

    name: str
    folder: Path
    bn_examples: int = BN_EXAMPLES
    reconstruct_examples: int = RECONSTRUCT_EXAMPLES
    validation: int = 5000
    cifar: str = "/tmp/data"
    drops: dict[str, dict[int, float]] = field(default_factory=dict)

    @cached_property
    def data(self) -> Data:
        """CIFAR-10 with a validation part that is taken off train."""
        return open_data(self.cifar, validation=5000, input_size=SUBJECTS[self.name].size, progress=False)

    @cached_property
    def model(self) -> nn.Module:
        """The trained network."""
        return build(self.name)

    @cached_property
    def coupling(self) -> Coupling:
        """What can be removed from it."""
        return couple(trace(self.model, example(self.name)).graph)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients on training images, written where torch-pruning's process finds them."""
        file = self.folder / "gradients.safetensors"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(gradients(self.model, self.data, 0), file)
        return load_file(file)

    def train_part(self, count: int) -> Split:
        """Return training images, the same for all tools."""
        return self.data.train.subset(count, seed=0)

    def mixed(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training images in mixed order: a folder's order is one class after the other.

        Batches of one class would give batch norms the variance within a class alone.
        """
        generator = torch.Generator().manual_seed(0)
        return self.train_part(count).batches(BATCH, shuffle=True, generator=generator)

    def plan(self, setting: str, ratio: float) -> Plan:
        """Plan the removal that a setting of ``OURS`` means."""
        allocation, scoring, scope, _ = OURS[setting]
        stream = SUBJECTS[self.name].stream if scope == "inner" else ()
        scores = unit_scores(self.coupling, self.model.state_dict(), Scoring(**scoring), self.gradients)
        size = {"ratio": ratio} if ratio < 1 else {"fewer_macs": ratio}
        knobs = Knobs(**size, allocation=allocation, ignore=stream)
        drops = self._drops(scoring["criterion"], scores) if allocation == "sensitivity" else None
        return channels(self.coupling, scores, knobs, drops=drops)

    def _drops(self, criterion: str, scores: dict[str, Tensor]) -> dict[str, dict[int, float]]:
        """Measure the rise of the loss for every group and share, once, on training images."""
        file = self.folder / f"drops-{criterion}.json"
        if not file.exists():
            part = list(self.mixed(SENSITIVITY_EXAMPLES))

            def score(model: nn.Module) -> float:
                reestimate_bn(made := copy.deepcopy(model), part)
                found = evaluate(made, part)
                return -float(nn.functional.cross_entropy(found.outputs, found.labels))

            found = measured_drops(self.model, self.coupling, scores, score, SHARES)
            file.write_text(json.dumps(found))
        return {name: {int(w): d for w, d in curve.items()} for name, curve in json.loads(file.read_text()).items()}

    def made(self, tool: str, setting: str, ratio: float, mend: str) -> nn.Module:
        """Return the pruned and mended network."""
        if tool == "unpruned":
            return copy.deepcopy(self.model)
        if tool == "torch-pruning":
            model = torch.load(self.folder / f"{setting}-{ratio}.pt", weights_only=False).eval()
        else:
            plan = self.plan(setting, ratio)
            model = apply_prune(self.model, plan, example(self.name)).eval()
            if mend == "reconstruct":
                part = self.train_part(self.reconstruct_examples).batches(BATCH)
                return reconstruct(self.model, model, self.coupling, plan, part)
        if mend == "bn":
            reestimate_bn(model, self.mixed(self.bn_examples))
        return model

    def smaller(self, model: nn.Module) -> dict[str, float]:
        """How many times fewer MACs a network has, and the share of its convolutions' channels that is gone."""
        before, after = (sum(c.out_channels for c in convolutions(m)) for m in (self.model, model))
        fewer = macs(self.model, example(self.name)) / macs(model, example(self.name))
        return {"macs_ratio": fewer, "channels_gone": 1 - after / before}


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """List the convolutions of a network."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def one_shot(bench: Bench, tool: str, setting: str, ratio: float, mend: str, split: str) -> dict[str, Any]:
    """Prune without training and score on the validation part or on the test images."""
    model = bench.made(tool, setting, ratio, mend)
    source = bench.data.test if split == "test" else bench.data.validation.subset(bench.validation, seed=0)
    found = evaluate(fused(model), source.batches(BATCH))
    return {
        "accuracy": found.accuracy,
        **bench.smaller(model),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        **({"correct": packed(found.correct.numpy())} if split == "test" else {}),
    }


def packed(correct: np.ndarray) -> str:
    """Write right and wrong as text."""
    return base64.b64encode(np.packbits(correct)).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """Read what ``packed`` wrote."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How all networks are trained further; ``steps`` above 0 stops early (a smoke test).

    ``distill`` is the share of the loss that the original's soft targets have, for kompakt's networks alone: neither
    torch-pruning nor the unpruned control is taught. ``attention`` and ``hint`` are the weights of attention maps and
    of features at the end of stages beside it, which want the original in PyTorch.
    """

    epochs: int = 10
    learning_rate: float = 0.05
    batch_size: int = 128
    distill: float = 0.9
    attention: float = 0.0
    hint: float = 0.0
    steps: int = 0

    @property
    def features(self) -> dict[str, float]:
        """The losses on features that have a weight."""
        return {loss: weight for loss, weight in (("attention", self.attention), ("hint", self.hint)) if weight}

    def lesson(self, bench: Bench, model: nn.Module) -> tuple[Objective, tuple[Teacher, ...]]:
        """What a taught network minimises, and who teaches it."""
        terms: tuple[Term, ...] = (Term(loss="soft_targets", weight=self.distill, knobs={"temperature": 4.0}),)
        who: Any = onnx_teacher(_float_file(bench))
        for loss, weight in self.features.items():
            terms += stage_terms(loss, bench.model, model, example(bench.name), weight=weight)
            who = bench.model
        return Objective(terms=terms, task_weight=1 - self.distill), (Teacher(model=who),)


def tuned(
    bench: Bench, tool: str, setting: str, ratio: float, mend: str, seed: int, tuning: Tuning, spent: Callable[[], bool]
) -> dict[str, Any]:
    """Prune, train, export, score in ONNX Runtime and time it beside the unpruned file.

    Raises:
        TimeUp: the time is used up; the checkpoint stays and the next call goes on from it.
    """
    model = bench.made(tool, setting, ratio, mend)
    taught = tool == "kompakt" and tuning.distill > 0
    recipe = f"{tuning.epochs}-{tuning.learning_rate}-{tuning.distill if taught else 0}-{tuning.steps}"
    recipe += "".join(f"-{loss}-{weight}" for loss, weight in tuning.features.items()) if taught else ""
    label = f"{tool}-{setting}-{ratio}-{mend}-{seed}-{recipe}"

    class Enough(Exception):
        pass

    def watch(_model: nn.Module, step: int) -> None:
        if tuning.steps and step >= tuning.steps:
            raise Enough
        if spent():
            raise TimeUp

    settings = TrainSettings(
        epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        warmup_epochs=min(1.0, tuning.epochs / 4),
        channels_last=SUBJECTS[bench.name].channels_last,
        compile=SUBJECTS[bench.name].compile,
        seed=seed,
        checkpoint=bench.folder / "checkpoints" / label,
        checkpoint_every=100,
    )
    # The whole training split: the choice was made before, and the test images are no part of it.
    loader = shuffled(bench.data.train, tuning.batch_size, seed=seed, augment=crop_and_flip)
    start = time.perf_counter()
    with suppress(Enough):
        teachers = dict(zip(("objective", "teachers"), tuning.lesson(bench, model), strict=True)) if taught else {}
        train(model, loader, settings, hooks=Hooks(after_step=(watch,), progress=False), **teachers)
    seconds = time.perf_counter() - start
    file = export_onnx(fold(trace(model.eval(), example(bench.name))), bench.folder / f"{label}.onnx")
    limit = BATCH if tuning.steps else None
    correct = _ort_correct(file, bench.data.test, limit)
    return {
        "accuracy": float(correct.mean()),
        "correct": packed(correct),
        **bench.smaller(model),
        "train_s": seconds,
        "latency": beside(_float_file(bench), file, SUBJECTS[bench.name].size),
    }


def _float_file(bench: Bench) -> Path:
    file = bench.folder / "float.onnx"
    return file if file.exists() else export_onnx(fold(trace(bench.model, example(bench.name))), file)


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _ort_correct(file: Path, split: Split, limit: int | None) -> np.ndarray:
    session = _session(file)
    name = session.get_inputs()[0].name
    parts = split.batches(BATCH, limit=limit)
    return np.concatenate([session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy() for x, y in parts])


def beside(before: Path, after: Path, size: int, seconds: float = 20.0) -> dict[str, float]:
    """Time two ONNX files, one thread, batch 1, interleaved; ratios are before / after: above 1 is faster."""
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    sessions = {"before": _session(before), "after": _session(after)}

    def run(session: onnxruntime.InferenceSession) -> Callable[[], object]:
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: image})

    found = interleave({key: run(session) for key, session in sessions.items()}, seconds=seconds)["after"]
    low, high = found.ratio_ci95
    return {"times_faster": 1 / found.ratio, "low": 1 / high, "high": 1 / low, "rounds": len(found.samples_ms)}


def latency(folder: Path, how: str, seconds: float) -> dict[str, float]:
    """Cut torchvision's resnet18 at 224 by random weights' norms; MAC ratio beside the measured time's ratio."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    inputs = torch.zeros(2, 3, 224, 224)
    coupling = couple(trace(model, inputs).graph)
    folder.mkdir(parents=True, exist_ok=True)
    align = alignment(coupling, Timing(target=target("onnxruntime"), folder=folder).layers)
    size = {"30 % of channels": {"ratio": 0.3}, "2×": {"fewer_macs": 2.0}, "4×": {"fewer_macs": 4.0}}[how]
    knobs = Knobs(align=align, **size)
    made = apply_prune(model, channels(coupling, unit_scores(coupling, model.state_dict()), knobs))
    files = [export_onnx(fold(trace(m.eval(), inputs)), folder / f"{n}.onnx") for n, m in enumerate((model, made))]
    ratio = macs(model, inputs) / macs(made, inputs)
    return {"align": align, "macs_ratio": ratio, **beside(*files, 224, seconds)}
