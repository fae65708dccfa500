"""``Job``: what to compress, on what, for what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from kompakt.allotment import Timing
from kompakt.artifact.targets import Target
from kompakt.cache import cache_folder
from kompakt.data import Data
from kompakt.measure.accuracy import Metric, Score
from kompakt.measure.judge import Judge
from kompakt.plan.plan import Plan
from kompakt.plan.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compress, on what, for what.

    Args:
        model: the original.
        name: how the user called it.
        data: decisions are made on its validation split, the final figures are of its test split.
        source: how the user called the data.
        target: the runtime.
        out: the folder that gets the artifact and its papers; it must exist.
        recipe: what is asked.
        plan: decisions made before, carried out instead of the recipe's; None lets the recipe decide.
        metric: outputs and labels → one value an example; None is top-1.
        threads: of the runtime.
        seconds: for timing, at the most.
        seed: of everything that is drawn.
        command: for the record.
        say: is told what is going on.
        progress: whether training may show a bar.
        networks: folder where networks that were pruned and trained are kept for other jobs; None keeps none.
        reference: the original's score on the validation split, where it is known.
        tick: called after every step of training; what it raises ends the job.
    """

    model: nn.Module
    name: str
    data: Data
    source: str
    target: Target
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    plan: Plan | None = None
    metric: Metric | None = None
    threads: int = 1
    seconds: float = 20.0
    seed: int = 0
    command: str = "compress"
    say: Callable[[str], None] = field(default=lambda text: None)
    progress: bool = True
    networks: Path | None = None
    reference: Score | None = None
    tick: Callable[[], None] | None = None

    @property
    def timing(self) -> Timing:
        """Where this job times single layers: in integers where its recipe makes them."""
        section = self.recipe.quantize
        return Timing(
            target=self.target,
            threads=self.threads,
            quantized=section is not None and section.codebook is None and not section.dynamic,
            folder=cache_folder(),
            progress=self.progress,
        )

    @property
    def judge(self) -> Judge:
        """The judge of this job's artifacts."""
        return Judge(target=self.target, metric=self.metric, threads=self.threads, seconds=self.seconds, seed=self.seed)
