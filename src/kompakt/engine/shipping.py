"""The end of a search: make the chosen candidate once more, measure it, and tell what was tried."""

import shutil
from dataclasses import replace
from pathlib import Path

from kompakt.engine.candidate import NETWORKS, Original, all_tried, folder_of
from kompakt.engine.frontier import Limits, choose, fronted, one_point_more
from kompakt.engine.strategy import Objective
from kompakt.errors import BudgetError
from kompakt.files import atomic_write
from kompakt.job import Job
from kompakt.measure.result import Result
from kompakt.plan.recipe import Recipe
from kompakt.search import compress


def shipped(
    job: Job, objective: Objective, limits: Limits, original: Original, notes: list[str], bounds: dict[str, object]
) -> Result:
    """Carry the chosen recipe out once more in the job's folder, and measure it on the test split.

    Raises:
        BudgetError: no candidate could be made.
    """
    tried = all_tried(job.out)
    best = choose(tried, limits, objective)
    if best is None:
        why = next((f": {item.note}" for item in tried if item.note), "")
        raise BudgetError(f"no candidate could be made{why}")
    folder = folder_of(job.out, best.number)
    recipe = Recipe.read(folder / "recipe.toml")
    one = replace(job, recipe=recipe, networks=job.out / NETWORKS, reference=original.score)
    result = compress(one)
    again = (job.out / result.files["artifact"]).read_bytes() == (folder / result.compressed.file).read_bytes()
    shutil.copyfile(folder / "recipe.toml", job.out / "recipe.toml")
    bound = (result.drop_ci95 or (0.0, 0.0))[1] if limits.confident else (result.drop_points or 0.0)
    limit = limits.max_drop
    met = limits.keeps(best) and (limit is None or bound <= limit)
    told = [
        f"candidate {best.number} of {len(tried)} ships: {best.what}",
        *notes,
        one_point_more(tried, limits, objective, best),
        *(f"candidate {item.number} {item.state}: {item.what}: {item.note}" for item in tried if item.note),
        "" if again else "made once more, the artifact differs in its bytes from the candidate that was judged",
        _knows(result, original),
    ]
    found = result.model_copy(
        update={
            "candidates": fronted(tried, best.number),
            "decisions": (*(line for line in told if line), *result.decisions),
            "files": result.files | {"recipe": "recipe.toml"},
            "budget": result.budget.model_copy(update={"max_drop": limit, "met": met, **bounds}),
        }
    )
    atomic_write(job.out / "result.json", found.model_dump_json(indent=1).encode())
    return found


def shipped_since(out: Path, moment: float) -> Result | None:
    """Return what another worker has shipped since then, of all the candidates that there are; None where none has.

    Args:
        out: the folder of the search.
        moment: seconds since the epoch.
    """
    path = out / "result.json"
    if not path.exists() or path.stat().st_mtime < moment:
        return None
    found = Result.read(path)
    known = {item.number for item in found.candidates}
    return found if known == {item.number for item in all_tried(out)} else None


def _knows(result: Result, original: Original) -> str:
    """Say so where the original was trained on the validation images: it is too good on them."""
    test, interval = result.baseline.accuracy, result.baseline.accuracy_ci95
    if test is None or interval is None or original.score.interval[0] <= interval[1]:
        return ""
    scores = f"{100 * original.score.accuracy:.1f} % on the validation split and {100 * test:.1f} % on the test split"
    return (
        f"the original scores {scores}: it may know the validation examples, which makes trained candidates look worse "
        "than they are; give the data a val/ of its own"
    )
