"""The options that commands share, and how they become a model, data and a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from torch import Tensor, nn

from kompakt.data import IMAGENET_MEAN, IMAGENET_STD, Data, load_metric, open_data
from kompakt.errors import InputError
from kompakt.measure.accuracy import Metric
from kompakt.models import load_model, parse_arguments

Bits = typer.Option(help="default: the target's", min=1, max=8)
MODEL_HELP = "package.module:callable, torchvision/NAME or timm/NAME"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model."""

    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
    weights: Annotated[Path | None, typer.Option(help="safetensors or a weights_only checkpoint")] = None
    model_arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the model's callable")] = None
    input_size: Annotated[int, typer.Option(help="height and width of the input", min=1)] = 224
    grey: Annotated[bool, typer.Option("--grey", help="one input channel instead of three")] = False

    def load(self, seed: int) -> nn.Module:
        """Build the model; random weights follow the seed."""
        torch.manual_seed(seed)
        return load_model(self.model, arguments=parse_arguments(self.model_arg or []), weights=self.weights)

    def example(self) -> Tensor:
        """Make an input of two images."""
        shape = (2, 1 if self.grey else 3, self.input_size, self.input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data."""

    data: Annotated[str, typer.Option(help="image folder with train/ and val/ or test/, or package.module:callable")]
    resize: Annotated[int | None, typer.Option(help="shorter side before the centre crop")] = None
    mean: Annotated[str, typer.Option(help="of each channel, comma separated")] = ",".join(map(str, IMAGENET_MEAN))
    std: Annotated[str, typer.Option(help="of each channel, comma separated")] = ",".join(map(str, IMAGENET_STD))
    metric: Annotated[str | None, typer.Option(help="package.module:callable instead of top-1")] = None
    on_corrupt: Annotated[
        Literal["refuse", "skip"], typer.Option(help="what to do with images that cannot be decoded")
    ] = "refuse"

    def open(self, model: ModelOptions, run: "RunOptions") -> Data:
        """Open the data for a model's input."""
        channels = 1 if model.grey else 3
        mean, std = _numbers(self.mean, "--mean", channels), _numbers(self.std, "--std", channels)
        return open_data(
            self.data,
            seed=run.seed,
            on_corrupt=self.on_corrupt,
            progress=not run.quiet,
            input_size=model.input_size,
            resize=self.resize,
            channels=channels,
            mean=mean,
            std=std,
        )

    def load_metric(self) -> Metric | None:
        """Load the metric, if one is given, as a function of arrays."""
        if self.metric is None:
            return None
        metric = load_metric(self.metric)

        def on_arrays(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
            return metric(torch.from_numpy(outputs), torch.from_numpy(labels)).numpy()

        return on_arrays


@dataclass(frozen=True, kw_only=True)
class OptionalDataOptions(DataOptions):
    """Which data, where there are any."""

    data: Annotated[str | None, typer.Option(help="image folder or package.module:callable")] = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run and how to talk."""

    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0
    threads: Annotated[int, typer.Option(help="of the runtime that is measured", min=1)] = 1
    json: Annotated[bool, typer.Option("--json", help="print the result as JSON and nothing else")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False
    verbose: Annotated[bool, typer.Option("--verbose", help="print every step")] = False


def _numbers(text: str, option: str, channels: int) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers separated by commas, as in 0.5,0.5,0.5") from None
    if channels == 1 and len(found) == 3:
        return (sum(found) / 3,)
    return found
