"""What an earlier command left in its ``--out`` folder: the ONNX file that ships, and the weights behind it."""

from pathlib import Path

from kompakt.errors import InputError
from kompakt.folders import contents
from kompakt.measure.result import Result

RESULT = "result.json"
STAGES = ("pruned", "student", "trained")


def artifact_of(folder: Path) -> Path:
    """Return the ONNX file that a command made: the one that ``result.json`` names, if there is one.

    ``prune`` without data and ``pick`` write no ``result.json``; their files go by their names.

    Raises:
        InputError: there is none, or ``result.json`` cannot be read.
    """
    names = [f"{name}.onnx" for name in ("model", *STAGES)]
    if (folder / RESULT).is_file():
        # Only the name: a record from elsewhere must not lead out of its folder.
        names.insert(0, Path(Result.read(folder / RESULT).files.get("artifact", names[0])).name)
    for name in names:
        if name.endswith(".onnx") and (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: holds no model; expected the folder of kompakt compress, quantize, prune, distill or finetune, "
        f"with model.onnx or pruned.onnx; found {contents(folder) or 'nothing'}"
    )


def long_form(folder: Path, artifact: Path, target: str) -> str:
    """Return the command that writes the model of a folder from its class, as far as the folder has the words."""
    files = (folder / f"{name}.safetensors" for name in (artifact.stem, *STAGES))
    weights = next((path for path in files if path.is_file()), None)
    rest = f"--plan {folder / 'plan.json'} --weights {weights}" if weights else "--weights FILE"
    return f"kompakt export MODEL {rest} --to {target}"
