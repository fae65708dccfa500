"""Whether training may see mirrored images: asked of the original, not of the user."""

from collections.abc import Iterator

import numpy as np

from kompakt.engine.candidate import Original
from kompakt.job import Job
from kompakt.measure.accuracy import Score, score
from kompakt.measure.judge import arrays

HARMLESS = 2.0
"""Points that the original may lose on mirrored images where they still mean the same; chance is about one of them."""


def augmentation(job: Job, original: Original) -> str:
    """Choose the augmentation of training where the recipe says nothing: ``flip`` or ``none``.

    Images may be mirrored where the original, which learned what they mean, is as good on the mirrored validation
    images as on the plain ones: a cat is one both ways, a digit is not. Two forms of an image can be kept with a
    teacher's answers, so that it costs nothing.
    """
    section = job.recipe.finetune
    if "augment" in section.model_fields_set or original.example.ndim != 4 or original.beliefs is None:
        return section.augment
    lost = job.judge.drop(original.score, _mirrored(job, original)).points
    return "flip" if lost <= HARMLESS else section.augment


def _mirrored(job: Job, original: Original) -> Score:
    """Score the original on the validation images, left and right exchanged."""

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for inputs, labels in arrays(job.data.validation):
            yield np.ascontiguousarray(inputs[..., ::-1]), labels

    return score(job.target.open(original.path, job.threads), batches(), job.metric)
