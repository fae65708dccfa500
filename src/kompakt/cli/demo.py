"""``kompakt demo``: the whole pipeline on data that ships with the dependencies."""

from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer

from kompakt.artifact.targets import target
from kompakt.build.train import Hooks, TrainSettings, shuffled, train
from kompakt.cli.options import RunOptions
from kompakt.cli.voice import show, speaking
from kompakt.data import DIGITS, open_data
from kompakt.files import writable_folder
from kompakt.job import Job
from kompakt.plan.recipe import BudgetSection, Recipe
from kompakt.report import build_report
from kompakt.search import compress
from kompakt.weights import save_weights

INPUT_SIZE = 32
EPOCHS = 6


def demo(
    run: RunOptions,
    out: Annotated[Path, typer.Option(help="folder for what the demo makes")] = Path("kompakt-demo"),
) -> None:
    """Train torchvision's resnet18 on scikit-learn's digits, compress it, measure it in ONNX Runtime."""
    folder = writable_folder(out)
    data = open_data(DIGITS, input_size=INPUT_SIZE, seed=run.seed, progress=not run.quiet)
    torch.manual_seed(run.seed)
    model = torchvision.models.resnet18(num_classes=10)
    settings = TrainSettings(epochs=EPOCHS, learning_rate=0.05, schedule="onecycle", channels_last=True, seed=run.seed)
    train(model, shuffled(data.train, 64, seed=run.seed), settings, hooks=Hooks(progress=not (run.quiet or run.json)))
    save_weights(model, folder / "baseline.safetensors")
    with speaking(run) as say:
        job = Job(
            model=model.eval(),
            name="torchvision/resnet18",
            data=data,
            source=DIGITS,
            target=target("onnxruntime"),
            out=folder,
            recipe=Recipe(budget=BudgetSection(max_drop=1.0)),
            threads=run.threads,
            seconds=10.0,
            seed=run.seed,
            command="demo",
            say=say,
        )
        result = compress(job)
        build_report(result, folder)
    show(result, run, str(out))
