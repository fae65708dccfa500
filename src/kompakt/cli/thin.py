"""The options of ``kompakt prune`` about single weights and about training with a penalty."""

from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Annotated, Literal

import typer

from kompakt.cli.training import TrainingOptions
from kompakt.errors import InputError
from kompakt.plan.recipe import SparseTrainingSection, SparsifySection

SINGLE = ("magnitude", "lamp", "sensitivity", "obd", "wanda")
"""Criteria of single weights; where channels go as well, ``--criterion`` is theirs and weights go by magnitude."""


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """Which weights become zero, and how."""

    unstructured: Annotated[float | None, typer.Option(help="share of single weights set to zero instead")] = None
    nm: Annotated[str | None, typer.Option(help="keep N of every M inputs instead, e.g. 2:4")] = None
    kernels: Annotated[bool, typer.Option("--kernels", help="with --unstructured: whole kernels go")] = False
    block: Annotated[str | None, typer.Option(help="with --unstructured: blocks of this shape go, e.g. 4,4")] = None
    scope: Annotated[Literal["layer", "global"], typer.Option(help="the share of each layer, or of all")] = "layer"
    update: Annotated[
        Literal["none", "refit", "sparsegpt", "obc"], typer.Option(help="mend on data the weights that stay")
    ] = "none"
    schedule: Annotated[
        Literal["one-shot", "gradual"], typer.Option(help="zero at once, or more and more in training")
    ] = "one-shot"
    soft: Annotated[bool, typer.Option("--soft", help="in training masked weights may come back")] = False
    rewind: Annotated[Path | None, typer.Option(help="weights from early in training to go back to")] = None

    def section(self, criterion: str, rounds: int, ignore: tuple[str, ...], *, alone: bool) -> SparsifySection | None:
        """Return the recipe's section about single weights, if they are asked for.

        Args:
            criterion: of ``--criterion``.
            rounds: of ``--rounds``, where no channels go.
            ignore: layers that stay dense.
            alone: whether single weights are all that goes.

        Raises:
            InputError: a value is out of range, or an option needs another.
        """
        if self.unstructured is None and self.nm is None:
            if self != SparsityOptions():
                raise InputError("which weights become zero? give --unstructured 0.9 or --nm 2:4")
            return None
        if self.unstructured is not None and not 0 < self.unstructured < 1:
            raise InputError(f"--unstructured {self.unstructured:g}: expected a share between 0 and 1, such as 0.9")
        if self.nm is not None and not fullmatch(r"[1-9]\d*:[1-9]\d*", self.nm):
            raise InputError(f"--nm {self.nm}: expected N:M, such as 2:4")
        if self.nm is not None and rounds > 1:
            raise InputError("--rounds removes a share step by step: --nm is a pattern, give --unstructured 0.9")
        if self.block is not None and not fullmatch(r"[1-9]\d*(,[1-9]\d*)+", self.block):
            raise InputError(f"--block {self.block}: expected a size for each dimension, such as 4,4")
        single = criterion if alone and criterion != "l2" else "magnitude"
        if single not in SINGLE:
            raise InputError(f"--criterion {single}: not for single weights; they take {', '.join(SINGLE)}")
        return SparsifySection(
            sparsity=self.unstructured,
            n_of_m=self.nm,
            criterion=single,  # type: ignore[arg-type]  # one of SINGLE
            scope=self.scope,
            block=tuple(int(size) for size in self.block.split(",")) if self.block else (),
            kernels=self.kernels,
            update=self.update,
            schedule=self.schedule,
            soft=self.soft,
            rounds=rounds,
            rewind=None if self.rewind is None else str(self.rewind),
            ignore=ignore,
        )


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """Training with a penalty, before anything is removed."""

    sparse_training: Annotated[
        Literal["l1", "bn_l1", "group_lasso", "greg"] | None, typer.Option(help="train with this penalty first")
    ] = None
    sparse_epochs: Annotated[int, typer.Option(help="epochs with the penalty", min=1)] = 1
    strength: Annotated[float | None, typer.Option(help="factor of the penalty; the default follows it")] = None
    sparse_share: Annotated[float, typer.Option(help="of the channels that greg presses out")] = 0.5

    def section(self, training: TrainingOptions) -> SparseTrainingSection | None:
        """Return the recipe's section, if a penalty is asked for.

        Raises:
            InputError: a value is out of range, or the penalty is missing.
        """
        if self.sparse_training is None:
            if self != PenaltyOptions():
                raise InputError("which penalty? give --sparse-training group_lasso")
            return None
        if self.strength is not None and not self.strength > 0:
            raise InputError(f"--strength {self.strength:g}: expected a positive number, such as 0.001")
        if not 0 < self.sparse_share < 1:
            raise InputError(f"--sparse-share {self.sparse_share:g}: expected a share between 0 and 1, such as 0.5")
        return SparseTrainingSection(
            **training.section(self.sparse_epochs).model_dump(),
            penalty=self.sparse_training,
            strength=self.strength,
            share=self.sparse_share,
        )
