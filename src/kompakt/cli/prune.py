"""``kompakt prune`` and ``kompakt finetune``."""

from dataclasses import dataclass, replace
from pathlib import Path
from re import fullmatch
from typing import Annotated, Literal

import typer
from rich.console import Console

from kompakt.allotment import Timing, need_faster, times_faster_for
from kompakt.artifact.targets import MADE_BY, target
from kompakt.cache import cache_folder
from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import DataOptions, ModelOptions, OptionalDataOptions, RunOptions
from kompakt.cli.thin import PenaltyOptions, SparsityOptions
from kompakt.cli.training import TrainingOptions
from kompakt.cli.voice import speaking
from kompakt.errors import InputError
from kompakt.files import atomic_write, writable_folder
from kompakt.graph.fold import fold
from kompakt.graph.trace import trace
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import BudgetSection, DistillSection, PruneSection, Recipe, SparsifySection
from kompakt.slim import as_planned, pruned, within_bytes
from kompakt.sparsity import sparsified
from kompakt.training import Slim
from kompakt.weights import save_weights


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to remove."""

    channels: Annotated[float | None, typer.Option(help="share of the channels that goes, 0 to 1")] = None
    fewer_macs: Annotated[float | None, typer.Option(help="times fewer multiply-accumulates, e.g. 2")] = None
    fewer_params: Annotated[float | None, typer.Option(help="times fewer parameters")] = None
    max_bytes: Annotated[int | None, typer.Option(help="of the parameters, at most", min=1)] = None
    times_faster: Annotated[float | None, typer.Option(help="than the original, measured")] = None
    max_latency_ms: Annotated[float | None, typer.Option(help="time for one example, measured")] = None
    drop_blocks: Annotated[int, typer.Option(help="residual blocks that go whole, by measured effect", min=0)] = 0
    rounds: Annotated[int, typer.Option(help="prune in so many steps, training between them", min=1)] = 1
    align: Annotated[
        str | None, typer.Option(help="widths become multiples of this; auto: measured, as with latency")
    ] = None
    criterion: Annotated[str, typer.Option(help="l1, l2, taylor, bn_scale, geometric_median, random …")] = "l2"
    allocation: Annotated[
        Literal["uniform", "global", "knapsack", "sensitivity", "latency"] | None,
        typer.Option(help="how much goes where; default: sensitivity with data, else global"),
    ] = None
    layer: Annotated[list[str] | None, typer.Option(help="NAME=SHARE: this layer's own share of channels")] = None
    ignore: Annotated[list[str] | None, typer.Option(help="layers that stay whole, by name or pattern")] = None

    @property
    def sizes(self) -> dict[str, float]:
        """The options that say how far to go, those that are given."""
        names = ("channels", "fewer_macs", "fewer_params", "max_bytes", "times_faster", "max_latency_ms")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def section(self) -> PruneSection | None:
        """Return the recipe's section about channels; None where no size is given.

        Raises:
            InputError: more than one size is given, or one is out of range.
        """
        if not self.sizes:
            if self.drop_blocks or self.layer:
                raise InputError("--drop-blocks and --layer go with channels: add --channels 0.5 or --fewer-macs 2")
            return None
        if len(self.sizes) != 1:
            raise InputError("say how much to remove: one of --channels 0.5, --fewer-macs 2 and --fewer-params 2")
        if self.channels is not None and not 0 < self.channels < 1:
            raise InputError(f"--channels {self.channels:g}: expected a share between 0 and 1, such as 0.3")
        for name in ("fewer_macs", "fewer_params", "times_faster"):
            if (value := getattr(self, name)) is not None and value <= 1:
                raise InputError(f"--{name.replace('_', '-')} {value:g}: expected more than 1, such as 2")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise InputError(f"--max-latency-ms {self.max_latency_ms:g}: expected a positive time, such as 5")
        timed = not {"times_faster", "max_latency_ms"}.isdisjoint(self.sizes)
        if self.allocation not in (None, "latency") and timed:
            raise InputError(f"a measured time is kept by --allocation latency, not {self.allocation}: leave it out")
        if self.allocation == "latency" and not timed:
            raise InputError("--allocation latency needs --times-faster or --max-latency-ms")
        return PruneSection(
            channels=self.channels,
            fewer_macs=self.fewer_macs,
            fewer_params=self.fewer_params,
            max_bytes=self.max_bytes,
            times_faster=self.times_faster,
            max_latency_ms=self.max_latency_ms,
            drop_blocks=self.drop_blocks,
            rounds=self.rounds,
            align=_align(self.align),
            criterion=self.criterion,
            allocation="latency" if timed else self.allocation,
            layers=dict(_share(text) for text in self.layer or ()),
            ignore=tuple(self.ignore or ()),
        )


def _align(text: str | None) -> int | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]  # auto or nothing
    if not fullmatch(r"[1-9]\d*", text):
        raise InputError(f"--align {text}: expected auto or a number of channels, such as 8")
    return int(text)


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    if not fullmatch(r"0?\.\d+", share) or not 0 < float(share) < 1:
        raise InputError(f"--layer {text}: expected NAME=SHARE, a share between 0 and 1, as in layer1.0.conv1=0.5")
    return name, float(share)


def prune(
    out: Out,
    model: ModelOptions,
    amount: PruneOptions,
    single: SparsityOptions,
    penalty: PenaltyOptions,
    data: OptionalDataOptions,
    training: TrainingOptions,
    run: RunOptions,
    plan: Annotated[Path | None, typer.Option(help="plan.json of an earlier run, perhaps edited")] = None,
    finetune_epochs: Annotated[int, typer.Option(help="epochs of training afterwards", min=0)] = 0,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
) -> None:
    """Remove channels from MODEL; with --data also train and measure what is left."""
    given, wanted = (None if plan is None else Plan.read(plan)), None
    if given is not None:
        amount, wanted = _as_planned(amount)
    section = amount.section()
    rounds = 1 if section is not None else amount.rounds
    thin = single.section(amount.criterion, rounds, tuple(amount.ignore or ()), alone=section is None)
    penalised = penalty.section(training)
    if section is None and thin is None and penalised is None and given is None:
        raise InputError("say how much to remove: one of --channels 0.5, --fewer-macs 2 and --fewer-params 2")
    if section is None and thin is None and amount.rounds > 1:
        raise InputError("--rounds goes with channels or single weights: add --channels 0.5 or --unstructured 0.9")
    if given is not None and wanted is not None:
        _need_faster(given, wanted, model, run)
    if data.data is not None:
        recipe = Recipe(
            sparse_training=penalised,
            prune=section,
            sparsify=thin,
            finetune=training.section(finetune_epochs),
            distill=DistillSection(terms=training.terms()),
            quantize=None,
            budget=BudgetSection(max_drop=max_drop),
        )
        run_job("prune", recipe, "onnxruntime", out, model, data, run, given)
    elif finetune_epochs or max_drop is not None or penalised is not None:
        raise InputError("--finetune-epochs, --sparse-training and --max-drop need --data")
    else:
        _without_data(section, thin, given, out, model, run)


def _as_planned(amount: PruneOptions) -> tuple[PruneOptions, PruneOptions | None]:
    """Beside a plan only a measured time may be asked for, which the plan has to keep."""
    timed = {"times_faster", "max_latency_ms"} & set(amount.sizes)
    if len(timed) != len(amount.sizes) or amount.layer or amount.drop_blocks:
        raise InputError("--plan says what goes: leave out the options that choose it, or the plan")
    amount.section()
    return replace(amount, times_faster=None, max_latency_ms=None), (amount if timed else None)


def _need_faster(plan: Plan, wanted: PruneOptions, model: ModelOptions, run: RunOptions) -> None:
    """Refuse a plan that is not as fast as asked, measured on its file beside the original's."""
    network, example = model.load(run.seed), model.example()
    timing = Timing(target=target("onnxruntime"), threads=run.threads, folder=cache_folder(), progress=not run.quiet)
    times = wanted.times_faster
    if times is None:
        times = times_faster_for(network, example, timing, wanted.max_latency_ms or 0.0)
    need_faster(network, plan, example, timing, times)


def finetune(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    epochs: Annotated[int, typer.Option(help="passes over the training split", min=1)],
) -> None:
    """Train MODEL further with the one training loop, and measure it before and after."""
    lesson = DistillSection(terms=training.terms())
    recipe = Recipe(finetune=training.section(epochs), distill=lesson, quantize=None)
    run_job("finetune", recipe, "onnxruntime", out, model, data, run)


def _without_data(
    section: PruneSection | None,
    thin: SparsifySection | None,
    plan: Plan | None,
    out: Path,
    model: ModelOptions,
    run: RunOptions,
) -> None:
    """Prune by weights alone: nothing is trained or scored."""
    network = model.load(run.seed)
    folder = writable_folder(out)
    with speaking(run) as say:
        runtime, found = target("onnxruntime"), Slim(model=network, plan=Plan(), did="")
        if plan is not None:
            found = as_planned(network, plan, model.example())
        if section is not None:
            say("removing channels")
            timing = Timing(target=runtime, threads=run.threads, folder=cache_folder(), progress=not run.quiet)
            section = within_bytes(section, network, None)
            found = pruned(network, None, section, model.example(), run.seed, timing)
        if thin is not None:
            _at_once(thin)
            say("setting weights to zero")
            found = sparsified(found, thin, model.example(), None, run.seed)
        save_weights(found.model, folder / "pruned.safetensors")
        atomic_write(folder / "plan.json", found.plan.to_json().encode())
        say("exporting")
        runtime.export(fold(trace(found.model, model.example())), folder / "pruned.onnx", metadata=MADE_BY)
    if not (run.quiet or run.json):
        console = Console()
        console.print(found.did, highlight=False)
        for item in found.left:
            console.print(f"left whole: {item.name}: {item.reason}", highlight=False)
        console.print(f"wrote {out}/: plan.json, pruned.onnx, pruned.safetensors", highlight=False, soft_wrap=True)
    if run.json:
        print(found.plan.to_json())


def _at_once(thin: SparsifySection) -> None:
    if thin.rounds > 1 or thin.soft or thin.schedule == "gradual" or thin.rewind is not None:
        raise InputError("gradual schedules, soft masks, rounds and rewinding happen in training: give --data, epochs")
