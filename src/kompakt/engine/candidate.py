"""Make one candidate in a folder of its own, judge it on the validation split, and keep it."""

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from kompakt.artifact.kpk_onnx import pack_onnx
from kompakt.engine.choice import Choice
from kompakt.errors import FormatError
from kompakt.files import atomic_write
from kompakt.finish import PACKED
from kompakt.job import Job
from kompakt.measure.accuracy import Score
from kompakt.measure.expected import Beliefs
from kompakt.measure.latency import interleave
from kompakt.measure.result import Tried
from kompakt.search import make

CANDIDATES, NETWORKS, PAPER = "candidates", "networks", "candidate.json"
TIMING_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Original:
    """What every candidate is judged against: the exported file, its score and its beliefs on the validation split."""

    path: Path
    score: Score
    beliefs: Beliefs | None
    example: np.ndarray


def folder_of(out: Path, number: int) -> Path:
    """Return the folder of a candidate."""
    return out / CANDIDATES / f"{number:03d}"


def verify(job: Job, original: Original, number: int, choice: Choice) -> Tried:
    """Make a candidate and judge its files; its folder appears when all of it is there.

    Args:
        job: of the whole search, with the user's recipe.
        original: the baseline.
        number: of the trial.
        choice: what to do.
    """
    started = time.monotonic()
    folder = folder_of(job.out, number)
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    recipe = choice.recipe(job.recipe)
    one = replace(job, out=part, recipe=recipe, networks=job.out / NETWORKS, reference=original.score)
    chosen = make(one).chosen
    score = job.judge.score(chosen.path, job.data.validation, keep=original.beliefs is not None)
    drop = job.judge.drop(original.score, score)
    expected = None
    if original.beliefs and score.seen:
        expected = original.beliefs.expect(score.seen.outputs, taught=choice.epochs > 0)
    packed = pack_onnx(chosen.path, part / PACKED)
    runs = {
        name: partial(job.target.open(path, job.threads), original.example)
        for name, path in (("original", original.path), ("candidate", chosen.path))
    }
    times = interleave(runs, seconds=min(job.seconds, TIMING_SECONDS), seed=job.seed)["candidate"]
    found = Tried(
        number=number,
        what=str(choice),
        epochs=choice.epochs,
        state="verified",
        drop_points=drop.points,
        drop_ci95=drop.ci95,
        expected_points=expected,
        size_bytes=chosen.path.stat().st_size,
        packed_bytes=packed,
        latency_ratio=times.ratio,
        latency_ratio_ci95=times.ratio_ci95,
        seconds=time.monotonic() - started,
    )
    atomic_write(part / "plan.json", chosen.plan.to_json().encode())
    atomic_write(part / "recipe.toml", recipe.to_toml().encode())
    atomic_write(part / PAPER, found.model_dump_json(indent=1).encode())
    for needless in (folder, part / "checkpoints"):
        shutil.rmtree(needless, ignore_errors=True)
    part.replace(folder)
    return found


def failed(out: Path, number: int, choice: Choice, note: str, seconds: float) -> Tried:
    """Write down that a candidate could not be made, and why."""
    folder = folder_of(out, number)
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    found = Tried(number=number, what=str(choice), epochs=choice.epochs, state="failed", note=note, seconds=seconds)
    atomic_write(folder / PAPER, found.model_dump_json(indent=1).encode())
    return found


def all_tried(out: Path) -> list[Tried]:
    """Read every candidate of a search that is whole, in order."""
    folders = sorted(path for path in (out / CANDIDATES).iterdir() if path.name.isdigit())
    return [found for found in map(kept, folders) if found is not None]


def kept(folder: Path) -> Tried | None:
    """Read the paper of a candidate that is whole, or return None.

    Raises:
        FormatError: the paper is not one of this version.
    """
    try:
        return Tried.model_validate_json((folder / PAPER).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise FormatError(f"{folder / PAPER}: {error.errors()[0]['msg']}; delete the folder to make it anew") from None
