"""``kompakt prune`` and ``kompakt finetune``."""

from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Annotated, Literal

import typer
from rich.console import Console

from kompakt.allotment import Timing
from kompakt.artifact.targets import target
from kompakt.cache import cache_folder
from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import DataOptions, ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.voice import speaking
from kompakt.errors import InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import BudgetSection, FinetuneSection, PruneSection, Recipe, SparsifySection
from kompakt.slim import Slim, pruned, sparsified
from kompakt.weights import save_weights

SINGLE = ("magnitude", "lamp", "sensitivity")
"""Criteria of single weights; where channels go as well, ``--criterion`` is theirs and weights go by magnitude."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train."""

    learning_rate: Annotated[float, typer.Option(help="highest rate of the cosine schedule", min=1e-8)] = 0.02
    batch_size: Annotated[int, typer.Option(help="examples a step", min=1)] = 128
    augment: Annotated[Literal["none", "crop_and_flip"], typer.Option(help="of the training images")] = "none"
    teacher: Annotated[
        list[str] | None, typer.Option(help="who teaches beside the labels: original, none or an ONNX file")
    ] = None
    temperature: Annotated[float, typer.Option(help="of the soft targets")] = 4.0
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write OUT/tensorboard")] = False

    def section(self, epochs: int) -> FinetuneSection:
        """Return the recipe's section.

        Raises:
            InputError: the temperature is not positive.
        """
        if not self.temperature > 0:
            raise InputError(f"--temperature {self.temperature:g}: expected a positive number; try 4")
        return FinetuneSection(
            epochs=epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            augment=self.augment,
            teacher=tuple(self.teacher or ("original",)),
            temperature=self.temperature,
            tensorboard=self.tensorboard,
        )


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to remove."""

    channels: Annotated[float | None, typer.Option(help="share of the channels that goes, 0 to 1")] = None
    fewer_macs: Annotated[float | None, typer.Option(help="times fewer multiply-accumulates, e.g. 2")] = None
    fewer_params: Annotated[float | None, typer.Option(help="times fewer parameters")] = None
    times_faster: Annotated[float | None, typer.Option(help="with --allocation latency: than the original")] = None
    drop_blocks: Annotated[int, typer.Option(help="residual blocks that go whole, by measured effect", min=0)] = 0
    rounds: Annotated[int, typer.Option(help="prune in so many steps, training between them", min=1)] = 1
    align: Annotated[int, typer.Option(help="widths become multiples of this", min=1)] = 1
    unstructured: Annotated[float | None, typer.Option(help="share of single weights set to zero instead")] = None
    nm: Annotated[str | None, typer.Option(help="keep N of every M inputs instead, e.g. 2:4")] = None
    criterion: Annotated[str, typer.Option(help="l1, l2, taylor, bn_scale, geometric_median, random …")] = "l2"
    allocation: Annotated[
        Literal["uniform", "global", "knapsack", "sensitivity", "latency"], typer.Option(help="how much goes where")
    ] = "global"
    ignore: Annotated[list[str] | None, typer.Option(help="layers that stay whole, by name or pattern")] = None

    def section(self) -> PruneSection | None:
        """Return the recipe's section about channels; None where single weights go.

        Raises:
            InputError: not exactly one of the sizes is given, or one is out of range.
        """
        sizes = (self.channels, self.fewer_macs, self.fewer_params, self.times_faster)
        given = [value for value in sizes if value is not None]
        if not given and (self.unstructured is not None or self.nm is not None):
            if self.drop_blocks or self.rounds > 1:
                raise InputError(
                    "--drop-blocks and --rounds go with channels: add one of --channels 0.5, --fewer-macs 2"
                )
            return None
        if len(given) != 1:
            raise InputError("say how much to remove: one of --channels 0.5, --fewer-macs 2 and --fewer-params 2")
        if self.channels is not None and not 0 < self.channels < 1:
            raise InputError(f"--channels {self.channels:g}: expected a share between 0 and 1, such as 0.3")
        for name in ("fewer_macs", "fewer_params", "times_faster"):
            if (value := getattr(self, name)) is not None and value <= 1:
                raise InputError(f"--{name.replace('_', '-')} {value:g}: expected more than 1, such as 2")
        if (self.times_faster is not None) != (self.allocation == "latency"):
            raise InputError("--times-faster and --allocation latency go together: say both or neither")
        return PruneSection(
            channels=self.channels,
            fewer_macs=self.fewer_macs,
            fewer_params=self.fewer_params,
            times_faster=self.times_faster,
            drop_blocks=self.drop_blocks,
            rounds=self.rounds,
            align=self.align,
            criterion=self.criterion,
            allocation=self.allocation,
            ignore=tuple(self.ignore or ()),
        )

    def sparse_section(self) -> SparsifySection | None:
        """Return the recipe's section about single weights, if they are asked for."""
        if self.unstructured is None and self.nm is None:
            return None
        if self.unstructured is not None and not 0 < self.unstructured < 1:
            raise InputError(f"--unstructured {self.unstructured:g}: expected a share between 0 and 1, such as 0.9")
        if self.nm is not None and not fullmatch(r"[1-9]\d*:[1-9]\d*", self.nm):
            raise InputError(f"--nm {self.nm}: expected N:M, such as 2:4")
        alone = self.criterion if self.section() is None and self.criterion != "l2" else "magnitude"
        if alone not in SINGLE:
            raise InputError(f"--criterion {alone}: scores channels; for single weights use {', '.join(SINGLE)}")
        return SparsifySection(
            sparsity=self.unstructured,
            n_of_m=self.nm,
            criterion=alone,  # type: ignore[arg-type]  # one of SINGLE
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
    section, thin = amount.section(), amount.sparse_section()
    if data.data is not None:
        recipe = Recipe(
            prune=section,
            sparsify=thin,
            finetune=training.section(finetune_epochs),
            quantize=None,
            budget=BudgetSection(max_drop=max_drop),
        )
        run_job("prune", recipe, "onnxruntime", out, model, data, run)
    elif finetune_epochs or max_drop is not None:
        raise InputError("--finetune-epochs and --max-drop need --data")
    else:
        _without_data(section, thin, out, model, run)


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


def _without_data(
    section: PruneSection | None, thin: SparsifySection | None, out: Path, model: ModelOptions, run: RunOptions
) -> None:
    """Prune by weights alone: nothing is trained or scored."""
    network = model.load(run.seed)
    folder = writable_folder(out)
    with speaking(run) as say:
        runtime, found = target("onnxruntime"), Slim(model=network, plan=Plan(), did="")
        if section is not None:
            say("removing channels")
            timing = Timing(target=runtime, threads=run.threads, folder=cache_folder(), progress=not run.quiet)
            found = pruned(network, None, section, model.example(), run.seed, timing)
        if thin is not None:
            say("setting weights to zero")
            found = sparsified(found, thin, model.example(), None, run.seed)
        save_weights(found.model, folder / "pruned.safetensors")
        atomic_write(folder / "plan.json", found.plan.to_json().encode())
        say("exporting")
        runtime.export(fold(trace(found.model, model.example())), folder / "pruned.onnx", metadata={})
    if not (run.quiet or run.json):
        console = Console()
        console.print(found.did, highlight=False)
        for item in found.left:
            console.print(f"left whole: {item.name}: {item.reason}", highlight=False)
        console.print(f"wrote {out}/: plan.json, pruned.onnx, pruned.safetensors", highlight=False, soft_wrap=True)
    if run.json:
        print(found.plan.to_json())
