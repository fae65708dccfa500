"""``kompakt quantize``: integers, codebooks, bits by layer, after training or in training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from kompakt.cli.compress import Out, run_job
from kompakt.cli.options import Bits, DataOptions, ModelOptions, RunOptions
from kompakt.cli.training import TrainingOptions
from kompakt.errors import InputError
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import BudgetSection, DistillSection, QatSection, QuantizeSection, Recipe

QAT_EPOCHS = 5


@dataclass(frozen=True, kw_only=True)
class IntegerOptions:
    """What becomes integers, and how."""

    weight_bits: Annotated[int | None, Bits] = None
    activation_bits: Annotated[int | None, Bits] = None
    group_size: Annotated[int | None, typer.Option(help="weights that share a scale", min=1)] = None
    dynamic: Annotated[bool, typer.Option("--dynamic", help="ranges of activations at run time")] = False
    float_sums: Annotated[
        bool, typer.Option("--float-sums", help="sums stay float: integers are what layers multiply")
    ] = False
    activation_range: Annotated[
        Literal["minmax", "moving", "percentile", "mse", "kl"], typer.Option(help="range estimator")
    ] = "mse"
    rounding: Annotated[
        Literal["nearest", "gptq", "retarget", "adaround", "brecq", "qdrop"] | None,
        typer.Option(help="how weights are rounded; default: retarget at 4 bits or fewer, else nearest"),
    ] = None
    rate: Annotated[
        float | None, typer.Option(help="small .kpk: nats of divergence that a bit may cost, as 3e-8", min=0.0)
    ] = None
    bias_correction: Annotated[bool, typer.Option("--bias-correction", help="mend the mean of each layer")] = False
    equalize: Annotated[
        bool | None,
        typer.Option(
            "--equalize/--no-equalize", help="move scale between layers first; default: with one codebook a layer"
        ),
    ] = None
    packed: Annotated[bool, typer.Option("--packed", help="weights of up to 4 bits two to a byte (INT4)")] = False
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="scales 2^n, zero points 0")] = False

    def keys(self) -> dict[str, Any]:
        """Return the recipe's keys."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class FewBitsOptions:
    """Codebooks and bits by layer."""

    codebook: Annotated[int | None, typer.Option(help="share 2^bits values among the weights", min=1, max=8)] = None
    codebook_granularity: Annotated[Literal["tensor", "channel"], typer.Option(help="one codebook for each")] = "tensor"
    codebook_grid: Annotated[
        Literal["free", "apot", "power_of_two", "ternary"], typer.Option(help="which values a codebook may hold")
    ] = "free"
    codebook_start: Annotated[
        Literal["linear", "density", "random", "exact"], typer.Option(help="where k-means begins")
    ] = "exact"
    mixed: Annotated[bool, typer.Option("--mixed", help="choose the bits of every layer; 4 on average unless said")] = (
        False
    )
    average_bits: Annotated[float | None, typer.Option(help="of the weights, at most", min=1, max=8)] = None
    average_activation_bits: Annotated[float | None, typer.Option(help="of the activations, at most", min=1, max=8)] = (
        None
    )
    max_bytes: Annotated[int | None, typer.Option(help="of the weights, at most", min=1)] = None
    fewer_bops: Annotated[float | None, typer.Option(help="times fewer bit operations than at 8 bits")] = None
    times_faster: Annotated[
        float | None, typer.Option(help="than the original, measured; as many layers stay float as that allows")
    ] = None
    sensitivity: Annotated[Literal["output", "hessian"], typer.Option(help="how errors are measured")] = "output"
    keep_ends: Annotated[bool, typer.Option("--keep-ends", help="first and last layer at 8 bits")] = False

    def keys(self) -> dict[str, Any]:
        """Return the recipe's keys.

        Raises:
            InputError: a budget of bits without ``--mixed``.
        """
        found = {name: value for name, value in vars(self).items() if name != "mixed"}
        budgets = ("average_bits", "average_activation_bits", "max_bytes", "fewer_bops", "times_faster")
        given = [name for name in budgets if found[name] is not None]
        if given and not self.mixed:
            raise InputError(f"--{given[0].replace('_', '-')} is a budget of bits chosen by layer: add --mixed")
        return found | ({"average_bits": 4.0} if self.mixed and not given else {})


def quantize(
    out: Out,
    model: ModelOptions,
    data: DataOptions,
    integers: IntegerOptions,
    few: FewBitsOptions,
    training: TrainingOptions,
    run: RunOptions,
    calibration: Annotated[int, typer.Option(help="training examples to calibrate on", min=1)] = 512,
    qat: Annotated[bool, typer.Option("--qat", help="quantization-aware training; 5 epochs unless said")] = False,
    qat_epochs: Annotated[int, typer.Option(help="epochs of quantization-aware training", min=0)] = 0,
    qat_weights: Annotated[
        Literal["steps", "ternary", "binary"], typer.Option(help="what is trained at one or two bits")
    ] = "steps",
    plan: Annotated[Path | None, typer.Option(help="plan.json of an earlier run, perhaps edited")] = None,
    max_drop: Annotated[float | None, typer.Option(help="points that may be lost", min=0.0)] = None,
    target_name: Annotated[str, typer.Option("--target", help="runtime that the artifact is for")] = "onnxruntime",
) -> None:
    """Quantize MODEL after training, or in training with --qat."""
    keys = {**integers.keys(), **few.keys(), "calibration_examples": calibration}
    try:
        section = QuantizeSection(**keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    taught = training.section(qat_epochs or (QAT_EPOCHS if qat else 0))
    aware = QatSection(**taught.model_dump(exclude_unset=True), weights=qat_weights)
    lesson, budget = DistillSection(terms=training.terms()), BudgetSection(max_drop=max_drop)
    recipe = Recipe(quantize=section, qat=aware, distill=lesson, budget=budget)
    given = Plan.read(plan) if plan is not None else None
    run_job("quantize", recipe, target_name, out, model, data, run, given)
