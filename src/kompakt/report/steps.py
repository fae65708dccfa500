"""The way from the baseline to what ships, as one list: what every table and plot of it shares."""

from dataclasses import dataclass
from typing import Literal

from kompakt.measure.result import Drop, Measurement, Result


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of the way: the baseline, a stage, or the artifact that ships."""

    label: str
    did: str
    role: Literal["baseline", "stage", "final"]
    measurement: Measurement
    drop: Drop | None


def steps_of(result: Result) -> tuple[Step, ...]:
    """List the baseline, every stage and the compressed artifact, each artifact once.

    A first stage that is the baseline itself and a last stage that is the artifact that ships are
    not listed a second time; the latter keeps its name and takes the final role.
    """
    stages = list(result.stages)
    baseline, compressed = result.baseline, result.compressed
    if stages and _same(stages[0].measurement, baseline):
        stages = stages[1:]
    label, did = "compressed", ""
    if stages and _same(stages[-1].measurement, compressed):
        label, did = stages[-1].name, stages[-1].did
        stages = stages[:-1]
    middle = (Step(label=s.name, did=s.did, role="stage", measurement=s.measurement, drop=s.drop) for s in stages)
    return (
        Step(label="baseline", did="", role="baseline", measurement=baseline, drop=None),
        *middle,
        Step(label=label, did=did, role="final", measurement=compressed, drop=drop_of(result)),
    )


def drop_of(result: Result) -> Drop | None:
    """The drop of what ships against the baseline, or None where it was not measured."""
    if result.drop_points is None:
        return None
    return Drop(points=result.drop_points, ci95=result.drop_ci95 or (result.drop_points, result.drop_points))


def is_share(result: Result) -> bool:
    """Whether every accuracy of the result is a share of 1, so that per cent make sense."""
    scores = (step.measurement.accuracy for step in steps_of(result))
    return all(0 <= score <= 1 for score in scores if score is not None)


def _same(one: Measurement, other: Measurement) -> bool:
    return (one.file, one.size_bytes, one.accuracy) == (other.file, other.size_bytes, other.accuracy)
