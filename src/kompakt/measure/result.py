"""The schema of ``result.json``: what was measured, read off loaded artifacts, as one document.

The schema is stable: fields are added, never renamed or removed, before ``schema_version`` changes.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kompakt.errors import InputError


class Record(BaseModel):
    """Base of every record here: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Latency(Record):
    """Time for one call, in milliseconds, measured interleaved with the baseline.

    ``ratio`` is the median over the rounds of this artifact's time to the baseline's in the same round,
    with its 95 % interval: the figure to quote on a noisy machine. Below 1 is faster.
    """

    p50: float
    p90: float
    threads: int
    batch: int
    runs: int
    ratio: float | None = None
    ratio_ci95: tuple[float, float] | None = None


class Measurement(Record):
    """One artifact, as its runtime shows it.

    ``accuracy`` is a share in 0…1 (or the user's metric), ``accuracy_ci95`` its interval;
    ``size_bytes`` is the whole file; ``macs`` are for one example; ``peak_memory_bytes`` is the
    resident set that loading and running the artifact adds in a process of its own.
    """

    name: str
    file: str
    accuracy: float | None = None
    accuracy_ci95: tuple[float, float] | None = None
    examples: int = 0
    size_bytes: int
    latency_ms: Latency | None = None
    peak_memory_bytes: int | None = None
    macs: int
    params: int
    bits_per_weight: float = 32.0


class Drop(Record):
    """How much an artifact lost against the ORIGINAL model on the same examples, in points."""

    points: float
    ci95: tuple[float, float]


class Stage(Record):
    """The figures after one stage of the pipeline, and what was done in it."""

    name: str
    did: str
    measurement: Measurement
    drop: Drop | None = None


class Layer(Record):
    """One layer: what was decided and what it costs.

    ``weight_sqnr_db`` and ``output_sqnr_db`` are signal-to-noise ratios against the float model;
    ``latency_ms`` is the time of the layer in the runtime, where the runtime tells it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    macs: int
    weight_bits: float
    activation_bits: float
    weight_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    latency_ms: float | None = None
    sensitivity: float | None = None
    note: str = ""


class LeftAlone(Record):
    """Something that was left as it was, with the reason."""

    name: str
    reason: str


class Budget(Record):
    """What may not be exceeded, and whether it was; ``confident`` judges the upper end of the drop's interval."""

    max_drop: float | None
    met: bool
    confident: bool = False
    max_bytes: int | None = None
    max_latency_ms: float | None = None


class Parity(Record):
    """Simulated model against the artifact in its runtime, on the same examples."""

    top1_agreement: float
    max_abs_error: float
    output_step: float
    sqnr_db: float
    examples: int


class Tried(Record):
    """One candidate of a search, judged on the validation split; ``front`` where none is better in every way.

    ``drop_points`` is counted, ``expected_points`` what fitted probabilities say of it; ``latency_ratio``
    is its time to the original's, interleaved; ``seconds`` is what making and judging it took.
    """

    number: int
    what: str
    epochs: int = 0
    state: Literal["verified", "failed"]
    drop_points: float | None = None
    drop_ci95: tuple[float, float] | None = None
    expected_points: float | None = None
    size_bytes: int | None = None
    packed_bytes: int | None = None
    latency_ratio: float | None = None
    latency_ratio_ci95: tuple[float, float] | None = None
    seconds: float = 0.0
    note: str = ""
    front: bool = False
    chosen: bool = False

    @property
    def points(self) -> float | None:
        """The drop that decides: what is expected of a trained network, else the larger of counted and expected."""
        if self.drop_points is None or self.expected_points is None:
            return self.drop_points
        return self.expected_points if self.epochs else max(self.drop_points, self.expected_points)


class Result(Record):
    """``result.json``: everything that one run of kompakt measured and decided.

    ``packed_bytes`` is the size of the artifact as a ``.kpk`` file, coded without loss for storage and transfer.
    """

    schema_version: Literal[1] = 1
    command: str
    model: str
    data: str
    target: str
    baseline: Measurement
    compressed: Measurement
    drop_points: float | None = None
    drop_ci95: tuple[float, float] | None = None
    budget: Budget
    stages: tuple[Stage, ...] = ()
    layers: tuple[Layer, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    decisions: tuple[str, ...] = ()
    parity: Parity | None = None
    packed_bytes: int | None = None
    candidates: tuple[Tried, ...] = ()
    snippet: str = ""
    files: dict[str, str] = {}
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}
    seed: int = 0
    wall_s: float = 0.0

    @staticmethod
    def read(path: str | Path) -> "Result":
        """Read a ``result.json``.

        Raises:
            InputError: the file cannot be read or does not follow the schema.
        """
        try:
            return Result.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InputError(f"{path}: {where}: {first['msg']}") from None
