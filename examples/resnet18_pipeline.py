"""The article's §4 as a pipeline that runs: ResNet-18 → int8 → 30 % fewer channels → ResNet-10 student → int8.

    python -m examples.resnet18_pipeline --weights resnet18-cifar10.safetensors --data CIFAR_FOLDER --out out/pipeline

Every table of ``resnet18_pipeline.toml`` is a recipe and gives a folder below ``--out``. A stage whose ``result.json``
is there is not run again, and a training that was stopped goes on from its checkpoint; ``--only`` runs some stages.
Every stage scores its files on the test split in ONNX Runtime and times them interleaved; at last the page is written.
"""

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import nn

from examples.resnet18_table import collect, page
from kompakt import Recipe
from kompakt.artifact.targets import target
from kompakt.data import Data, open_data
from kompakt.errors import InputError
from kompakt.files import writable_folder
from kompakt.job import Job
from kompakt.search import compress
from kompakt.weights import load_weights

RECIPES = Path(__file__).with_suffix(".toml")
STAGES = ("int8", "thirty", "pruned", "student", "control")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Where the pipeline runs and on what.

    Args:
        model: the original.
        data: its validation split decides, its test split is reported.
        source: how the data are called.
        out: gets a folder for every stage.
        seconds: for timing.
        say: is told what is going on.
    """

    model: nn.Module
    data: Data
    source: str
    out: Path
    seconds: float = 20.0
    say: Callable[[str], None] = print

    def run(self, name: str, recipe: Recipe) -> Path:
        """Run a stage, unless it has been run; return its folder."""
        folder = writable_folder(self.out / name)
        if not (folder / "result.json").exists():
            job = Job(
                model=self.model,
                name="torchvision/resnet18",
                data=self.data,
                source=self.source,
                target=target("onnxruntime"),
                out=folder,
                recipe=recipe,
                seconds=self.seconds,
                say=lambda text: self.say(f"{name}: {text}"),
            )
            compress(job)
        return folder


def recipes(out: Path, smoke: bool) -> dict[str, Recipe]:
    """Read the recipe of every stage; a smoke test trains each for one epoch.

    Raises:
        InputError: a table is no recipe.
    """
    text = RECIPES.read_text().replace('"OUT/', f'"{out}/')
    found = {}
    for name, table in tomllib.loads(text).items():
        if smoke and "finetune" in table:
            table["finetune"]["epochs"] = 1
        found[name] = Recipe.model_validate(table)
    if tuple(found) != STAGES:
        raise InputError(f"{RECIPES.name}: expected the tables {', '.join(STAGES)}; found {', '.join(found)}")
    return found


def parts(asked: dict[str, Recipe]) -> str:
    """Say which stages train on a part of the images."""
    counts = {name: recipe.finetune.examples for name, recipe in asked.items() if recipe.finetune.examples}
    told = ", ".join(f"{name} on {count:,}" for name, count in counts.items())
    return f"Trained on a part of the training images: {told}." if told else ""


def digits() -> Data:
    """Take a few of scikit-learn's digits, for a smoke test."""
    data = open_data("sklearn/digits", input_size=32, progress=False)
    parts = {"train": data.train.subset(64), "validation": data.validation.subset(32), "test": data.test.subset(64)}
    return replace(data, **parts)


def original(weights: Path | None) -> nn.Module:
    """Build torchvision's unmodified ResNet-18 for ten classes."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    return (model if weights is None else load_weights(model, weights)).eval()


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are asked for, and write the table of those that are there."""
    parser = argparse.ArgumentParser(prog="python -m examples.resnet18_pipeline", description=__doc__)
    parser.add_argument("--weights", type=Path, help="of torchvision's resnet18 with ten classes")
    parser.add_argument("--data", help="CIFAR-10 as an image folder")
    parser.add_argument("--out", type=Path, default=Path("out/pipeline"))
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="run these stages alone")
    parser.add_argument("--page", type=Path, help="also write the page here")
    parser.add_argument("--seconds", type=float, default=60.0, help="for timing the files")
    parser.add_argument("--smoke", action="store_true", help="random weights, a few digits, one epoch")
    given = parser.parse_args(arguments)
    if not given.smoke and not (given.weights and given.data):
        parser.error("give --weights and --data, or --smoke")
    torch.set_num_threads(1)
    data = digits() if given.smoke else open_data(given.data, input_size=48, progress=False)
    seconds = 2.0 if given.smoke else given.seconds
    pipeline = Pipeline(
        model=original(given.weights), data=data, source=given.data or "digits", out=given.out, seconds=seconds
    )
    asked = recipes(given.out, given.smoke)
    for name in given.only:
        pipeline.run(name, asked[name])
    one = next(iter(data.test.batches(1, limit=1)))[0].numpy()
    text = page(collect(given.out, one, seconds), data.description, parts(asked))
    (given.out / "pipeline.md").write_text(text)
    if given.page:
        given.page.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
