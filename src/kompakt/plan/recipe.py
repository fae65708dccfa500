"""``Recipe``: what the user asked for, as TOML or Python; one schema, clear errors."""

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kompakt.errors import InputError

Augment = Literal["none", "flip", "crop_and_flip", "shift"]
"""What training makes of images, see ``kompakt.augment``."""


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantizeSection(Section):
    """``[quantize]``: uniform integers after training.

    Bits that are not given are the target's own. ``equalize`` moves scale between layers,
    ``bias_correction`` mends the mean of each layer's output, ``rounding`` chooses the integers of the
    weights (``kompakt.build.refine``): where nothing is said, ``retarget`` at 4 bits or fewer, else
    ``nearest``. The range of weights is, where nothing is said, ``mse`` below 8 bits, else ``minmax``.
    ``codebook`` shares 2^bits values among the weights instead; activations then stay float unless their bits are
    said. ``average_bits``, ``average_activation_bits``, ``max_bytes`` (of weights) and ``fewer_bops`` choose the bits
    of every layer among ``widths``; with ``times_faster`` a layer may stay float as well, as far as the file, timed in
    the target's runtime, is so many times faster than the original. ``rate`` chooses steps and integers so that the
    coded file is small: nats of divergence from the model's predictions that a bit may cost (``kompakt.build.rate``).
    ``keep_ends`` holds the first and the last layer at 8 bits. ``float_sums`` leaves sums and averages in float, as
    the literature counts bits of activations: of what layers multiply.
    ``power_of_two`` makes every scale 2ⁿ and every zero point 0.
    """

    weight_bits: int | None = Field(default=None, ge=1, le=8)
    activation_bits: int | None = Field(default=None, ge=1, le=8)
    group_size: int | None = Field(default=None, ge=1)
    codebook: int | None = Field(default=None, ge=1, le=8)
    codebook_granularity: Literal["tensor", "channel"] = "tensor"
    codebook_grid: Literal["free", "apot", "power_of_two", "ternary"] = "free"
    codebook_start: Literal["linear", "density", "random", "exact"] = "exact"
    average_bits: float | None = Field(default=None, ge=1, le=8)
    average_activation_bits: float | None = Field(default=None, ge=1, le=8)
    max_bytes: int | None = Field(default=None, ge=1)
    fewer_bops: float | None = Field(default=None, gt=1)
    times_faster: float | None = Field(default=None, gt=0)
    widths: tuple[Annotated[int, Field(ge=2, le=8)], ...] = (2, 3, 4, 5, 6, 8)
    sensitivity: Literal["output", "hessian"] = "output"
    rate: float | None = Field(default=None, gt=0)
    keep_ends: bool = False
    float_sums: bool = False
    packed: bool = False
    power_of_two: bool = False
    weight_range: Literal["minmax", "mse"] | None = None
    activation_range: Literal["minmax", "moving", "percentile", "mse", "kl"] = "mse"
    dynamic: bool = False
    equalize: bool | None = None
    bias_correction: bool = False
    rounding: Literal["nearest", "gptq", "retarget", "adaround", "brecq", "qdrop"] | None = None
    calibration_examples: int = Field(default=512, ge=1)
    keep: tuple[str, ...] = ()

    @property
    def bits_each(self) -> float:
        """Bits that a weight has on average before it is coded, as far as the recipe says so; else 8."""
        return self.codebook or self.average_bits or self.weight_bits or 8

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen layer by layer."""
        budgets = (self.average_bits, self.average_activation_bits, self.max_bytes, self.fewer_bops, self.times_faster)
        return any(budgets)


class PruneSection(Section):
    """``[prune]``: coupled channels that are really removed; see ``kompakt.methods.channels.Knobs``.

    One of ``channels`` (the share that goes), ``fewer_macs`` and ``fewer_params`` (how many times fewer), ``max_bytes``
    (of the parameters, at the bits of ``[quantize]``)
    and, with the latency allocation, ``times_faster`` or ``max_latency_ms`` says how far. The score of a channel is
    ``criterion`` (``reduction`` over what is coupled, ``normalisation`` between groups), how much goes where is
    ``allocation``: where nothing is said, ``sensitivity`` with data, else ``global``. Widths become multiples of
    ``align``: ``auto`` measures which, and is what the latency allocation does where nothing is said. With
    ``reconstruct`` the layers that lost inputs are refitted on data; else batch norms are estimated anew.
    ``drop_blocks`` residual blocks go first, those whose loss
    costs least. ``rounds`` prunes in so many steps, training between them.
    """

    channels: float | None = Field(default=None, gt=0, lt=1)
    fewer_macs: float | None = Field(default=None, gt=1)
    fewer_params: float | None = Field(default=None, gt=1)
    max_bytes: int | None = Field(default=None, ge=1)
    times_faster: float | None = Field(default=None, gt=1)
    max_latency_ms: float | None = Field(default=None, gt=0)
    drop_blocks: int = Field(default=0, ge=0)
    rounds: int = Field(default=1, ge=1)
    criterion: str = "l2"
    reduction: Literal["sum", "mean", "max", "norm", "first", "product"] | None = None
    normalisation: Literal["none", "mean", "max", "sum", "standardise", "size"] | None = None
    allocation: Literal["uniform", "global", "knapsack", "sensitivity", "latency"] | None = None
    align: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    min_width: int = Field(default=4, ge=1)
    reconstruct: bool = True
    layers: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    ignore: tuple[str, ...] = ()


class SparsifySection(Section):
    """``[sparsify]``: single weights, N of every M, or blocks become zero and stay so in training and export.

    ``sparsity`` is the share that goes (of each layer, or of all together with ``scope = "global"``);
    ``n_of_m = "2:4"`` keeps two of every four inputs. ``sensitivity`` with a global scope is SNIP. ``kernels`` takes
    whole kernels, ``block`` blocks of a shape. ``update`` mends on data what stays: ``refit`` keeps the criterion's
    masks, ``sparsegpt`` and ``obc`` choose as they mend. While it trains, a ``gradual`` schedule rises to the share
    (Zhu and Gupta 2017) and ``soft`` masks let weights come back. ``rounds`` removes and trains in turn; ``rewind``
    names weights from early in training that each round goes back to (the lottery ticket, Frankle and Carbin 2019).
    """

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    n_of_m: str | None = Field(default=None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    criterion: Literal["magnitude", "lamp", "sensitivity", "obd", "wanda"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    block: tuple[Annotated[int, Field(ge=1)], ...] = ()
    kernels: bool = False
    update: Literal["none", "refit", "sparsegpt", "obc"] = "none"
    schedule: Literal["one-shot", "gradual"] = "one-shot"
    soft: bool = False
    rounds: int = Field(default=1, ge=1)
    rewind: str | None = None
    ignore: tuple[str, ...] = ()


class FinetuneSection(Section):
    """``[finetune]``: training of the pruned network, taught by the original where ``teacher`` says so.

    The loss is ``(1 - distill) · cross entropy + distill · Σ weight · term`` over the terms of ``[distill]``,
    soft targets at ``temperature`` where it says nothing. ``teacher`` is ``original``, ``none``, an ONNX file, or
    several of them, mixed evenly. ``rate`` trains weights as the integers that the file will hold: so many nats of
    the loss are worth a bit of it (``kompakt.numerics.priced``); the price rises to it over the share ``rise`` of the
    training, 0 begins at it. The cosine of the learning rate begins anew ``cycles`` times. With ``checkpoint`` a run
    that was stopped goes on from where it was. ``compile`` compiles the step (``TrainSettings.compile``).
    """

    epochs: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=0.02, gt=0)
    cycles: int = Field(default=1, ge=1)
    batch_size: int = Field(default=128, ge=1)
    examples: int | None = Field(default=None, ge=1)
    augment: Augment = "none"
    channels_last: bool = False
    compile: bool = False
    teacher: str | tuple[str, ...] = "original"
    distill: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=4.0, gt=0)
    checkpoint: bool = False
    tensorboard: bool = False
    rate: float | None = Field(default=None, gt=0)
    rise: float = Field(default=0.0, ge=0, lt=1)


class SparseTrainingSection(FinetuneSection):
    """``[sparse_training]``: training before anything else, with a penalty that presses to exactly zero.

    ``penalty`` is ``l1`` on single weights, ``bn_l1`` on batch norms' scales, ``group_lasso`` on coupled channels or
    ``greg``, which presses out the lowest ``share`` of every group's channels. Channels that are zero at the end are
    removed, without any change of the outputs; single weights that are zero stay so. ``strength`` is the penalty's
    factor; where nothing is said, ``kompakt.build.penalty.STRENGTHS``.
    """

    penalty: Literal["l1", "bn_l1", "group_lasso", "greg"] = "group_lasso"
    strength: float | None = Field(default=None, gt=0)
    share: float = Field(default=0.5, gt=0, lt=1)
    epochs: int = Field(default=1, ge=1)
    rate: None = None
    rise: Literal[0] = 0


class TermSection(Section):
    """One term of ``[distill]``: see ``kompakt.build.distill.Term``.

    Losses on features without taps compare the last tensor of every resolution stage. Losses on outputs take
    their temperature from ``[finetune]`` unless ``knobs`` gives one.
    """

    loss: str = "soft_targets"
    weight: float = Field(default=1.0, ge=0)
    teacher: str | tuple[str, ...] | None = None
    student: str | tuple[str, ...] | None = None
    warmup_epochs: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=0.0, ge=0)
    standardize: bool = False
    knobs: dict[str, float] = {}


class DistillSection(Section):
    """``[distill]``: which student learns, and how it is compared with its teachers.

    ``student`` is made from the original (``kompakt.methods.students``) or a reference to the user's own; none
    trains the network itself. ``start`` is ``teacher``, its weights, or ``random``. ``cache`` keeps the
    teachers' outputs on disk, in the output folder or in one that is named, for training on images that come again.
    """

    student: str | None = None
    start: Literal["teacher", "random"] = "teacher"
    terms: tuple[TermSection, ...] = Field(default=(TermSection(),), min_length=1)
    cache: bool | str = False


class RoundSection(Section):
    """``[[before]]``: a round of removing and training that comes before what the other sections say.

    The network is cut to ``fewer_macs`` times fewer multiplications than the original (and ``drop_blocks`` blocks
    fewer), trained for ``epochs`` by ``[finetune]``, at ``rate`` nats a bit where that is given. The next round goes on
    from it: the last is what ``[prune]`` and ``[finetune]`` themselves say.
    """

    fewer_macs: float = Field(default=1.0, ge=1)
    drop_blocks: int = Field(default=0, ge=0)
    epochs: int = Field(default=1, ge=1)
    rate: float | None = Field(default=None, gt=0)


class QatSection(FinetuneSection):
    """``[qat]``: training of the quantized network, with learned steps, in the one training loop.

    ``weights`` says what is trained where weights have one or two bits: ``steps``, or signs as ``ternary`` or
    ``binary``. Centroids of a codebook are trained too.
    """

    learning_rate: float = Field(default=0.01, gt=0)
    rate: None = None
    rise: Literal[0] = 0
    channels_last: bool = True
    weights: Literal["steps", "ternary", "binary"] = "steps"


class BudgetSection(Section):
    """``[budget]``: the largest drop in points against the original model."""

    max_drop: float | None = Field(default=None, ge=0)


class Recipe(Section):
    """Everything that a run is asked to do.

    Example:
        >>> from kompakt.plan.recipe import Recipe
        >>> Recipe.from_toml("[quantize]\\nweight_bits = 8").quantize.weight_bits
        8
    """

    before: tuple[RoundSection, ...] = ()
    distill: DistillSection = DistillSection()
    sparse_training: SparseTrainingSection | None = None
    prune: PruneSection | None = None
    sparsify: SparsifySection | None = None
    finetune: FinetuneSection = FinetuneSection()
    quantize: QuantizeSection | None = QuantizeSection()
    qat: QatSection = QatSection()
    budget: BudgetSection = BudgetSection()

    @model_validator(mode="after")
    def _rounds_lead_here(self) -> "Recipe":
        """Check that every round removes as much as the one before it or more, and that the rounds end in [prune]."""
        if not self.before:
            return self
        prune, others = self.prune or PruneSection(), (self.sparse_training, self.sparsify, self.distill.student)
        sizes = [(each.fewer_macs, each.drop_blocks) for each in self.before]
        sizes += [(prune.fewer_macs or 1.0, prune.drop_blocks)]
        if any(after[0] < first[0] or after[1] < first[1] for first, after in pairwise(sizes)):
            raise ValueError(f"before: fewer MACs and blocks must not grow again, found {sizes}; order the rounds")
        if prune != PruneSection() and (prune.rounds > 1 or (prune.fewer_macs is None and not prune.drop_blocks)):
            raise ValueError("before: goes with [prune] fewer_macs and drop_blocks, in one round")
        if any(other is not None for other in others) or not self.finetune.epochs:
            raise ValueError("before: goes with [prune] and [finetune] epochs, not with students, zeros or no training")
        return self

    def earlier(self) -> "Recipe":
        """Return the recipe of the rounds before: what they make, float, where the last of them ends."""
        *first, last = self.before
        prune = None if self.prune is None else self.prune.model_copy(update=_cut(last.fewer_macs, last.drop_blocks))
        whole = prune is None or (prune.fewer_macs is None and not prune.drop_blocks)
        finetune = self.finetune.model_copy(update={"epochs": last.epochs, "rate": last.rate})
        update = {"before": tuple(first), "prune": None if whole else prune, "finetune": finetune}
        return self.model_copy(update=update)

    def remaining(self) -> PruneSection | None:
        """Return what is left to remove from what the rounds before made; None where nothing is."""
        last, prune = self.before[-1], self.prune
        if prune is None:
            return None
        ratio, blocks = (prune.fewer_macs or 1.0) / last.fewer_macs, prune.drop_blocks - last.drop_blocks
        return prune.model_copy(update=_cut(ratio, blocks)) if ratio > 1 or blocks else None

    @staticmethod
    def from_toml(text: str, where: str = "recipe") -> "Recipe":
        """Read a recipe from TOML.

        Raises:
            InputError: the text is not TOML, or a key or value is wrong; the message names it.
        """
        try:
            return Recipe.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{where}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where}: {key}: {first['msg']}, found {first['input']!r}") from None

    def to_toml(self) -> str:
        """Write the recipe as TOML that ``from_toml`` reads back to an equal one; what is as by default is left out."""
        lines: list[str] = []
        for name in type(self).model_fields:
            if name == "before":
                for each in self.before:
                    lines += ["", "[[before]]", *_toml(each.model_dump(mode="json", exclude_defaults=True))]
                continue
            section = getattr(self, name)
            if section is not None and (section != type(self).model_fields[name].default or name == "quantize"):
                lines += ["", f"[{name}]", *_toml(section.model_dump(mode="json", exclude_defaults=True))]
        if self.quantize is None:
            raise InputError("a recipe that quantizes nothing cannot be written as TOML")
        return "\n".join(lines[1:]) + "\n"

    @staticmethod
    def read(path: str | Path) -> "Recipe":
        """Read a recipe from a TOML file."""
        try:
            return Recipe.from_toml(Path(path).read_text(), str(path))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: is not a text file; expected a recipe in TOML") from None


def _cut(fewer_macs: float, blocks: int) -> dict[str, object]:
    """What [prune] says of how much goes."""
    return {"fewer_macs": fewer_macs if fewer_macs > 1 else None, "drop_blocks": blocks}


def _toml(values: dict[str, object]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]


def _value(value: object) -> str:
    """Write a value on one line; strings, numbers and lists are written in TOML as in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(_toml(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
