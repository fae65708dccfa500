"""What a sender remembers: what it could not send, and what it sent last, in case it was not taken.

Reference: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (error feedback), arXiv 1901.09847.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.layout import State
from kompakt.files import atomic_path


class Feedback:
    """The residual of one client, which its next update starts from; it survives a restart in a file.

    Args:
        residual: by weight, what was not sent.
        sent: by weight, what the last message sent.
        rate: bits of the last message over the entropy of its codes, by which the next finds its step sooner.
        number: of the round that the last message was for, where rounds are numbered.

    Example:
        >>> from kompakt.federated import encode_update
        >>> feedback = Feedback()
        >>> _ = encode_update({"w": torch.ones(8)}, {"w": torch.zeros(8)}, feedback=feedback)
        >>> feedback.settle(accepted=False)  # the server did not take it: nothing is lost
        >>> bool(torch.allclose(feedback.residual["w"], torch.ones(8)))
        True
    """

    def __init__(
        self,
        residual: State | None = None,
        sent: State | None = None,
        rate: float = 1.0,
        number: int | None = None,
    ) -> None:
        self.residual: dict[str, Tensor] = dict(residual or {})
        self.sent: dict[str, Tensor] = dict(sent or {})
        self.rate, self.number = rate, number

    def settle(self, *, accepted: bool) -> None:
        """Forget what was sent if it was accepted; otherwise put it back into the residual."""
        if not accepted:
            for name, sent in self.sent.items():
                self.residual[name] = self.residual[name] + sent
        self.sent = {}

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, in one step."""
        tensors = {f"residual.{name}": tensor for name, tensor in self.residual.items()}
        tensors |= {f"sent.{name}": tensor for name, tensor in self.sent.items()}
        with atomic_path(path) as temporary:
            head = {"rate": self.rate, "number": self.number}
            save_file(tensors, temporary, {"kompakt.feedback": json.dumps(head)})

    @staticmethod
    def load(path: str | Path) -> "Feedback":
        """Read what ``save`` wrote; an empty one if there is no such file.

        Raises:
            FormatError: the file is none of ours, or holds what is not finite.
        """
        if not Path(path).exists():
            return Feedback()
        try:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["kompakt.feedback"])
                rate, number = head["rate"], head["number"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError, OSError):
            raise FormatError(f"{path}: not a saved feedback; delete it to begin without a residual") from None
        if (
            type(rate) is not float
            or type(number) not in (int, type(None))
            or not 1e-6 < rate < 1e6
            or not all(bool(t.isfinite().all()) for t in tensors.values())
        ):
            raise FormatError(f"{path}: the residual is not finite; delete it to begin without one")
        parts = {
            role: {name.removeprefix(f"{role}."): t for name, t in tensors.items() if name.startswith(f"{role}.")}
            for role in ("residual", "sent")
        }
        return Feedback(parts["residual"], parts["sent"], rate, number)


def remembered(feedback: Feedback | None, name: str, like: Tensor) -> Tensor:
    """The residual of a weight, zeros if there is none.

    Raises:
        FormatError: it has another shape: it belongs to another model.
    """
    found = feedback.residual.get(name) if feedback is not None else None
    if found is None:
        return torch.zeros_like(like)
    if found.shape != like.shape:
        raise FormatError(f"{name}: a residual of shape {tuple(found.shape)}, {tuple(like.shape)} expected")
    return found.to(like.dtype)
