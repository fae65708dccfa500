"""A client: the state it holds and what it has not sent yet, on its disk, so that a restart loses neither."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.broadcast import Packet, open_packet
from kompakt.federated.encode import DEFAULT, encode_update
from kompakt.federated.feedback import Feedback
from kompakt.federated.layout import State
from kompakt.federated.spec import UpdateSpec
from kompakt.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a server says of a client's last updates.

    Args:
        taken: the last round whose update of this client went into the mean.
        refused: the last round whose update was refused for what was in it.
    """

    taken: int | None = None
    refused: int | None = None


class Member:
    """One client of a federation; all that it must remember is in a folder.

    Args:
        folder: where; made if it is missing. Each client and each federation needs its own.
        spec: how it sends updates.

    Raises:
        FormatError: what is in the folder is damaged.
    """

    def __init__(self, folder: str | Path, spec: UpdateSpec = DEFAULT) -> None:
        self._folder, self._spec = Path(folder), spec
        self._folder.mkdir(parents=True, exist_ok=True)
        self.feedback = Feedback.load(self._folder / "feedback.safetensors")
        self.number, self.state = _load(self._folder / "held.safetensors")

    def open(self, packet: Packet, receipt: Receipt | None = None) -> dict[str, Tensor]:
        """Bring the held state up to date, and settle what became of the last update.

        Args:
            packet: what the server sent.
            receipt: given where an update is asked for; what was neither taken nor refused is sent again.

        Raises:
            FormatError: the packet does not fit the state that is held.
        """
        state = open_packet(packet, self.state, self.number)
        if receipt is not None and self.feedback.sent:
            if self.feedback.number == receipt.refused:
                self.feedback = Feedback(rate=self.feedback.rate)
            else:
                self.feedback.settle(accepted=self.feedback.number == receipt.taken)
        if (packet.number, packet.whole) != (self.number, None):
            head = {"number": packet.number, "names": list(state)}
            with atomic_path(self._folder / "held.safetensors") as path:
                save_file({name: t.contiguous() for name, t in state.items()}, path, {"kompakt.held": json.dumps(head)})
        self.number, self.state = packet.number, state
        return dict(state)

    def encode(self, new: State, number: int, seed: int = 0) -> bytes:
        """Code what training made of the held state; what is not sent is on the disk before this returns.

        Args:
            new: the state after training.
            number: of the round.
            seed: give each client another.

        Raises:
            InputError: the state does not fit the one held, or is not finite.
            FormatError: no state is held.
        """
        if self.state is None:
            raise FormatError("update: there is no state that it could start from; ask for a whole one")
        data = encode_update(new, self.state, self._spec.at(number), feedback=self.feedback, seed=seed + number)
        self.feedback.number = number
        self.feedback.save(self._folder / "feedback.safetensors")
        return data


def _load(path: Path) -> tuple[int | None, dict[str, Tensor] | None]:
    if not path.exists():
        return None, None
    try:
        with safe_open(path, "pt") as file:
            head = json.loads((file.metadata() or {})["kompakt.held"])
            return int(head["number"]), {name: file.get_tensor(name) for name in head["names"]}
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        raise FormatError(f"{path}: not a saved state; delete it to be sent a whole one") from None
