"""``kompakt prune`` and ``kompakt finetune``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from kompakt.artifact.targets import target
from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import DataOptions, ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.voice import speaking
from kompakt.errors import InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.plan.recipe import BudgetSection, FinetuneSection, PruneSection, Recipe
from kompakt.slim import pruned
from kompakt.weights import save_weights


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train."""

    learning_rate: Annotated[float, typer.Option(help="highest rate of the cosine schedule", min=1e-8)] = 0.02
    batch_size: Annotated[int, typer.Option(help="examples a step", min=1)] = 128
    augment: Annotated[Literal["none", "crop_and_flip"], typer.Option(help="of the training images")] = "none"
    teacher: Annotated[Literal["original", "none"], typer.Option(help="who teaches beside the labels")] = "original"

    def section(self, epochs: int) -> FinetuneSection:
        """Return the recipe's section."""
        return FinetuneSection(
            epochs=epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            augment=self.augment,
            teacher=self.teacher,
        )


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to remove."""

    channels: Annotated[float | None, typer.Option(help="share of the channels that goes, 0 to 1")] = None
    fewer_macs: Annotated[float | None, typer.Option(help="times fewer multiply-accumulates, e.g. 2")] = None
    fewer_params: Annotated[float | None, typer.Option(help="times fewer parameters")] = None
    criterion: Annotated[str, typer.Option(help="l1, l2, taylor, bn_scale, geometric_median, random …")] = "l2"
    allocation: Annotated[Literal["uniform", "global", "knapsack"], typer.Option(help="how much goes where")] = "global"
    ignore: Annotated[list[str] | None, typer.Option(help="layers that stay whole, by name or pattern")] = None

    def section(self) -> PruneSection:
        """Return the recipe's section.

        Raises:
            InputError: not exactly one of the three sizes is given, or a share is outside (0, 1).
        """
        given = [value for value in (self.channels, self.fewer_macs, self.fewer_params) if value is not None]
        if len(given) != 1:
            raise InputError("say how much to remove: one of --channels 0.5, --fewer-macs 2 and --fewer-params 2")
        if self.channels is not None and not 0 < self.channels < 1:
            raise InputError(f"--channels {self.channels:g}: expected a share between 0 and 1, such as 0.3")
        for name, value in (("--fewer-macs", self.fewer_macs), ("--fewer-params", self.fewer_params)):
            if value is not None and value <= 1:
                raise InputError(f"{name} {value:g}: expected more than 1, such as 2")
        return PruneSection(
            channels=self.channels,
            fewer_macs=self.fewer_macs,
            fewer_params=self.fewer_params,
            criterion=self.criterion,
            allocation=self.allocation,
            ignore=tuple(self.ignore or ()),
        )


def prune(
    out: Out,
    model: ModelOptions,
    amount: PruneOptions,
    data: OptionalDataOptions,
    training: TrainingOptions,
    run: RunOptions,
    finetune_epochs: Annotated[int, typer.Option(help="epochs of training afterwards", min=0)] = 0,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
) -> None:
    """Remove channels from MODEL; with --data also train and measure what is left."""
    section = amount.section()
    if data.data is not None:
        recipe = Recipe(
            prune=section,
            finetune=training.section(finetune_epochs),
            quantize=None,
            budget=BudgetSection(max_drop=max_drop),
        )
        run_job("prune", recipe, "onnxruntime", out, model, data, run)
    elif finetune_epochs or max_drop is not None:
        raise InputError("--finetune-epochs and --max-drop need --data")
    else:
        _without_data(section, out, model, run)


def finetune(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    epochs: Annotated[int, typer.Option(help="passes over the training split", min=1)],
) -> None:
    """Train MODEL further with the one training loop, and measure it before and after."""
    recipe = Recipe(finetune=training.section(epochs), quantize=None)
    run_job("finetune", recipe, "onnxruntime", out, model, data, run)


def _without_data(section: PruneSection, out: Path, model: ModelOptions, run: RunOptions) -> None:
    """Prune by weights alone: nothing is trained or scored."""
    network = model.load(run.seed)
    folder = writable_folder(out)
    with speaking(run) as say:
        say("removing channels")
        found = pruned(network, None, section, model.example(), run.seed)
        save_weights(found.model, folder / "pruned.safetensors")
        atomic_write(folder / "plan.json", found.plan.to_json().encode())
        say("exporting")
        target("onnxruntime").export(fold(trace(found.model, model.example())), folder / "pruned.onnx", metadata={})
    if not (run.quiet or run.json):
        console = Console()
        console.print(found.did, highlight=False)
        for item in found.left:
            console.print(f"left whole: {item.name}: {item.reason}", highlight=False)
        console.print(f"wrote {out}/: plan.json, pruned.onnx, pruned.safetensors", highlight=False, soft_wrap=True)
    if run.json:
        print(found.plan.to_json())
