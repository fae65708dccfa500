"""Networks that were pruned and trained, kept on disk so that many recipes can share one training."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from kompakt.build.structure import restructured
from kompakt.errors import FormatError
from kompakt.files import atomic_write
from kompakt.graph.graph import Left
from kompakt.job import Job
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import Recipe
from kompakt.slim import Slim, slim
from kompakt.weights import save_weights

SECTIONS = {"before", "sparse_training", "prune", "sparsify", "finetune", "distill"}
TOLD = "told.json"
"""Written last: a network whose folder holds it is whole."""


class _Told(BaseModel):
    """What is kept beside the weights and the plan."""

    model_config = ConfigDict(extra="forbid")

    did: str
    name: str
    left: tuple[tuple[str, str], ...]


def slimmed(job: Job, example: Tensor) -> Slim:
    """Prune, sparsify and train as the recipe says, or take what was made so before from ``job.networks``.

    A network is found again by the sections of its recipe, the seed and the number of training examples; the folder
    must serve one model and one data set. Masks of single weights are not kept: such networks are made anew.
    """
    asked = job.recipe
    single = asked.sparsify is not None or (asked.sparse_training is not None and asked.sparse_training.penalty == "l1")
    if job.networks is None or job.plan is not None or single:
        return slim(job, example)
    parts = (asked.sparse_training, asked.prune, asked.distill.student)
    if not asked.finetune.epochs and all(part is None for part in parts):
        return slim(job, example)
    folder = job.networks / network_key(job)
    if (folder / TOLD).exists():
        job.say("taking the network that was made before")
        return _read(job, folder)
    found = slim(job, example, slimmed)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(found.model, folder / "weights.safetensors")
    atomic_write(folder / "plan.json", found.plan.to_json().encode())
    told = _Told(did=found.did, name=found.name, left=tuple((item.name, item.reason) for item in found.left))
    atomic_write(folder / TOLD, told.model_dump_json().encode())
    return found


def is_made(job: Job, recipe: Recipe) -> bool:
    """Whether the network of a recipe is there."""
    return job.networks is not None and (job.networks / network_key(replace(job, recipe=recipe)) / TOLD).exists()


def network_key(job: Job) -> str:
    """Name a network by what decides it."""
    sections = job.recipe.model_dump(mode="json", include=SECTIONS)
    text = json.dumps([sections, job.seed, len(job.data.train)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(job: Job, folder: Path) -> Slim:
    try:
        told = _Told.model_validate_json((folder / TOLD).read_bytes())
        plan = Plan.from_json((folder / "plan.json").read_text())
        model = restructured(job.model, plan, load_file(folder / "weights.safetensors"))
    except (OSError, ValidationError) as error:
        raise FormatError(f"{folder}: not a network that was kept here ({error}); delete the folder") from None
    left = tuple(Left(name=name, reason=reason) for name, reason in told.left)
    return Slim(model=model.eval(), plan=plan, did=told.did, left=left, name=told.name)
