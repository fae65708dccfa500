"""``Choice``: one point of the space that is searched, and the recipe that carries it out."""

from dataclasses import dataclass

from kompakt.augment import FORMS
from kompakt.plan.recipe import BudgetSection, FinetuneSection, PruneSection, QuantizeSection, Recipe, RoundSection


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one candidate does to the model.

    Args:
        fewer_macs: how many times fewer multiplications; 1 removes no channel.
        drop_blocks: residual blocks replaced by the identity.
        rate: nats that a bit of the coded weights may cost, of divergence where nothing is trained, else of the loss:
            then the integers themselves are trained; 0 rounds to nearest.
        epochs: of training after pruning, the original as teacher.
        after: the trained network that this one is cut from and goes on from; None is the original.
    """

    fewer_macs: float = 1.0
    drop_blocks: int = 0
    rate: float = 0.0
    epochs: int = 0
    after: "Choice | None" = None

    @property
    def rounds(self) -> "tuple[Choice, ...]":
        """This choice behind all that it goes on from, the first first."""
        return (*(self.after.rounds if self.after else ()), self)

    @property
    def step_back(self) -> bool:
        """Whether layers go back to float until the budget holds: where integers are all that is done."""
        return self == Choice()

    def __str__(self) -> str:
        path = " → ".join(f"{each.fewer_macs:g}×" for each in self.rounds)
        parts = [f"{path} fewer MACs"] if self.fewer_macs > 1 else []
        if self.drop_blocks:
            parts.append(f"{self.drop_blocks} block{'s' if self.drop_blocks > 1 else ''} dropped")
        if self.epochs:
            rounds = f" in {len(self.rounds)} rounds" if self.after else ""
            epochs = sum(each.epochs for each in self.rounds)
            parts.append(f"{epochs} epoch{'s' if epochs > 1 else ''}{rounds}")
        how = "trained" if self.epochs else "integers"
        parts.append(f"{how} at rate {self.rate:g}" if self.rate else "integers")
        if self.step_back:
            parts.append("layers back to float")
        return ", ".join(parts)

    def recipe(self, base: Recipe) -> Recipe:
        """Return the recipe that carries this choice out.

        Args:
            base: the user's, for what is not chosen here: criteria, rates, augmentation, calibration, the budget.
        """
        prune = None
        if self.fewer_macs > 1 or self.drop_blocks:
            section = base.prune or PruneSection(allocation="sensitivity")
            fewer = self.fewer_macs if self.fewer_macs > 1 else None
            update = {"fewer_macs": fewer, "channels": None, "fewer_params": None, "max_bytes": None}
            update |= {"times_faster": None, "max_latency_ms": None, "drop_blocks": self.drop_blocks, "rounds": 1}
            prune = section.model_copy(update=update)
        quantize = base.quantize or QuantizeSection()
        if self.rate and not self.epochs:
            quantize = quantize.model_copy(update={"rate": self.rate})
        training: dict[str, object] = {"epochs": self.epochs, "checkpoint": self.epochs > 0}
        if self.rate and self.epochs:
            training["rate"] = self.rate
        finetune: FinetuneSection = base.finetune.model_copy(update=training)
        budget = base.budget if self.step_back else BudgetSection()
        distill = base.distill
        if self.epochs and cached(base):
            distill = distill.model_copy(update={"cache": distill.cache or True})
        before = tuple(each.as_round() for each in self.rounds[:-1])
        made = {
            "before": before,
            "prune": prune,
            "quantize": quantize,
            "finetune": finetune,
            "distill": distill,
            "budget": budget,
        }
        return base.model_copy(update=made)

    def as_round(self) -> RoundSection:
        """Return what a recipe says of this choice where another goes on from it."""
        return RoundSection(
            fewer_macs=self.fewer_macs, drop_blocks=self.drop_blocks, epochs=self.epochs, rate=self.rate or None
        )


def cached(base: Recipe) -> bool:
    """Whether a teacher's answers can be kept: images come again, and somebody teaches."""
    return base.finetune.augment in FORMS and base.finetune.teacher != "none" and base.finetune.distill > 0
