"""The cells of ``python -m benchmarks.prune`` on disk."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.prune_cells import OURS, TimeUp
from kompakt.errors import InputError
from kompakt.measure.machine import machine

TEST_IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Measured cells by their settings, one JSON line each."""

    folder: Path
    spent: Callable[[], bool]

    def all(self) -> list[dict[str, Any]]:
        """Read every cell."""
        files = sorted(self.folder.glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the cells whose keys have these values."""
        return [cell for cell in self.all() if all(cell["key"].get(name) == value for name, value in wanted.items())]

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell; measure it where it is not there.

        Raises:
            TimeUp: it is not there and no time is left.
        """
        found = next((cell for cell in self.all() if cell["key"] == key), None)
        if found is not None:
            return found
        if self.spent():
            raise TimeUp
        cell = {
            "key": key,
            **measure(),
            "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "machine": machine()["cpu"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{key['part']}-{key['model']}.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        shown = {name: value for name, value in cell.items() if name not in ("correct", "machine")}
        print(json.dumps(shown), flush=True)
        return cell


def best(cells: Cells, model: str, ratio: float, tool: str, images: int) -> str:
    """Return the setting of a tool that is best on the validation part.

    Raises:
        InputError: none was measured.
    """
    found = cells.find(
        part="one-shot", model=model, ratio=ratio, tool=tool, split="validation", mend="bn", images=images
    )
    found = [cell for cell in found if tool != "kompakt" or OURS[cell["key"]["setting"]][3]]
    if ratio < 1:  # a share of the channels: what an allocation of MACs removes may be less
        found = [cell for cell in found if cell["channels_gone"] > ratio - 0.005]
    if not found:
        raise InputError(f"{model} at {ratio}×: no setting of {tool} was scored; run --only one-shot first")
    return str(max(found, key=lambda cell: cell["accuracy"])["key"]["setting"])
