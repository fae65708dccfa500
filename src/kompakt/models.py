"""Model references: what ``MODEL`` on the command line stands for.

``package.module:callable``, ``path/to/file.py:callable``, ``torchvision/NAME`` and ``timm/NAME``.
Nothing is ever downloaded: weights come from a file (``kompakt.weights``).
"""

import copy
import inspect
from ast import literal_eval
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from kompakt.errors import InputError, MissingExtraError, ModelError
from kompakt.references import call, load_callable, nearest
from kompakt.weights import check_finite, load_weights, save_weights

__all__ = ["load_model", "parse_arguments", "save_weights"]

TAKEN_BY = MappingProxyType(
    {
        ".kpk": "kompakt unpack, kompakt export and kompakt bench take it",
        ".onnx": "kompakt check and kompakt bench take it",
        ".pt2": "kompakt check and kompakt bench take it",
    }
)
WEIGHT_FILES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors"})
DOWNLOADS = frozenset({"pretrained", "weights", "weights_backbone", "pretrained_backbone", "checkpoint_path"})
FORMS = "package.module:callable, path/to/file.py:callable, torchvision/NAME or timm/NAME"


def load_model(
    reference: str, *, arguments: Mapping[str, object] = MappingProxyType({}), weights: str | Path | None = None
) -> nn.Module:
    """Build the model that ``reference`` names: on the CPU, in fp32, in evaluation mode.

    Without ``weights`` the parameters are what the callable gives; a random initialisation follows
    the global seed (``torch.manual_seed``) that the caller has set.

    Args:
        reference: ``package.module:callable``, ``path/to/file.py:callable``, ``torchvision/NAME`` or
            ``timm/NAME``.
        arguments: keyword arguments for the callable, e.g. ``{"num_classes": 10}``.
        weights: a safetensors file or a checkpoint of ``torch.save``; see ``weights.load_weights``.

    Raises:
        InputError: the reference, an argument or the weights do not fit; the line says what to try.
        MissingExtraError: timm is asked for and not installed.
        ModelError: what was built is not a usable module, or a weight is not finite.
    """
    model = _usable(reference, _build(reference, dict(arguments), fresh=weights is None))
    if weights is not None:
        load_weights(model, weights, name=reference)
    check_finite(model, where=reference if weights is None else str(weights))
    return model.eval()


def parse_arguments(pairs: Iterable[str]) -> dict[str, object]:
    """Turn ``["num_classes=10", "act=relu"]`` into ``{"num_classes": 10, "act": "relu"}``.

    Values are Python literals (numbers, True, None, tuples, quoted strings); ``true``, ``false`` and
    ``none`` are read too, and everything else is a string.

    Raises:
        InputError: an entry has no ``=``, a name is not an identifier or is given twice.
    """
    found: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--model-arg {pair}: expected NAME=VALUE, as in num_classes=10")
        if name in found:
            raise InputError(f"--model-arg {pair}: {name} is given twice")
        found[name] = _literal(text)
    return found


def _literal(text: str) -> object:
    """Read a Python literal, or keep the text."""
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _build(reference: str, arguments: dict[str, object], *, fresh: bool) -> object:
    """Call what the reference names; the result is not checked yet. ``fresh``: its first values count."""
    if reference.startswith("torchvision/"):
        return _torchvision(reference, arguments, fresh=fresh)
    if reference.startswith("timm/"):
        return _timm(reference, arguments)
    if ":" not in reference:
        raise InputError(_not_a_reference(reference))
    found = load_callable(reference)
    if isinstance(found, nn.Module):
        if arguments:
            raise InputError(f"{reference}: is a finished module and takes no arguments; leave --model-arg out")
        return copy.deepcopy(found)
    _check_arguments(reference, found, arguments)
    return call(found, reference, arguments)


def _torchvision(reference: str, arguments: dict[str, object], *, fresh: bool) -> object:
    """Build a model of torchvision's list, without weights."""
    from torchvision import models

    name = reference.removeprefix("torchvision/")
    if name not in models.list_models():
        raise InputError(f"{reference}: torchvision has no model {name}{nearest(name, models.list_models())}")
    _refuse_downloads(reference, arguments)
    builder = models.get_model_builder(name)
    given: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        given["weights_backbone"] = None  # the default of a detector downloads its backbone
    if name in ("googlenet", "inception_v3"):
        given["init_weights"] = fresh  # takes them ten seconds; they warn when it is left out
    return call(builder, reference, given | arguments)


def _timm(reference: str, arguments: dict[str, object]) -> object:
    """Build a model of timm's list, without weights."""
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(f'{reference}: timm is not installed; pip install "kompakt[timm]"') from error
    name = reference.removeprefix("timm/")
    if not timm.is_model(name):
        raise InputError(f"{reference}: timm has no model {name}{nearest(name, timm.list_models())}")
    _refuse_downloads(reference, arguments)
    return call(timm.create_model, reference, {"model_name": name, "pretrained": False} | arguments)


def _refuse_downloads(reference: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that would make a library fetch weights."""
    for name in sorted(name for name in DOWNLOADS & set(arguments) if arguments[name]):
        raise InputError(f"{reference}: {name} cannot be set, nothing is downloaded; give a file with --weights")


def _check_arguments(reference: str, function: object, arguments: Mapping[str, object]) -> None:
    """Check the arguments against the signature, where there is one to read.

    Raises:
        InputError: an argument is unknown or missing.
    """
    assert callable(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-in callables have none; the call itself will tell
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(f"{reference}{signature}: {error}; set arguments with --model-arg NAME=VALUE") from error


def _usable(reference: str, model: object) -> nn.Module:
    """Check that a module was built and can be moved to the CPU in fp32.

    Raises:
        ModelError: it is something else, or has tensors without values.
    """
    if isinstance(model, nn.DataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, nn.Module):
        raise ModelError(f"{reference}: returned {type(model).__name__}, expected a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{reference}: {name} is lazy; run the model once on an example before returning it")
        if tensor.is_meta:
            raise ModelError(f"{reference}: {name} is on the meta device and has no values; build it on the CPU")
    return model.cpu().float()


def _not_a_reference(reference: str) -> str:
    """The line for a string of another form: a file, a folder or a bare name."""
    suffix = Path(reference).suffix.lower()
    if suffix in TAKEN_BY:
        return f"{reference}: this command needs a PyTorch module ({FORMS}); of a {suffix} file, {TAKEN_BY[suffix]}"
    if suffix in WEIGHT_FILES:
        return f"{reference}: these are weights, not a model; give {FORMS} and this file as --weights"
    if suffix == ".py" or Path(reference).is_file():
        return f"{reference}: name the callable in it, as in {reference}:build"
    from torchvision.models import list_models

    if reference in list_models():
        return f"{reference}: not a reference; did you mean torchvision/{reference} or timm/{reference}?"
    library, slash, name = reference.partition("/")
    known = nearest(library, ("torchvision", "timm")) if slash and name else ""
    return f"{reference}: not a model reference{known or f'; expected {FORMS}'}"
