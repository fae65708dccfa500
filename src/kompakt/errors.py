"""The errors that kompakt raises: one root class, each message a single line.

A message says where, what was expected, what was found and what to try, as in
``conv1.weight: group size 48 does not divide 64; use 16, 32 or 64``.
"""


class KompaktError(Exception):
    """Root of every error that kompakt raises on purpose; the command line exits with 2."""


class InputError(KompaktError):
    """What the user gave cannot be used: a path, a reference, a knob, a data folder."""


class ModelError(KompaktError):
    """The model cannot be loaded, traced or run."""


class PlanError(KompaktError):
    """A plan does not fit the model it is applied to, or contradicts itself."""


class FormatError(KompaktError):
    """A file is not what it claims to be: truncated, corrupt, hostile or of another version."""


class MissingExtraError(KompaktError):
    """An optional dependency is not installed; the message names the install command."""


class BudgetError(KompaktError):
    """No artifact meets the budget; the message names the best that can be reached."""
