"""The downlink: numbered states that clients hold, and the messages from each to the next."""

from dataclasses import dataclass

from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.decode import decode_update
from kompakt.federated.encode import encode_update
from kompakt.federated.layout import State
from kompakt.federated.spec import UpdateSpec


@dataclass(frozen=True, kw_only=True)
class Packet:
    """What one client is sent: a whole state, or the updates from the one that it holds.

    Args:
        number: of the state that the client holds afterwards.
        start: of the state that the first update is applied to.
        whole: the state, for a client that holds none or one too old.
        updates: messages to be applied one after another.
    """

    number: int
    start: int = 0
    whole: dict[str, Tensor] | None = None
    updates: tuple[bytes, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of what is sent."""
        return sum(map(len, self.updates)) + state_bytes(self.whole or {})


class Broadcast:
    """What a server has sent to all: the state that clients hold, and how older holders come to it.

    The server's own state is never lost in coding: each message is the difference of it to what clients hold, so what
    one message leaves out is in the next.

    Args:
        state: the first state; clients get it whole.
        spec: how updates are coded; None sends whole states.

    Example:
        >>> import torch
        >>> sent = Broadcast({"w": torch.zeros(500)}, UpdateSpec(ratio=10))
        >>> sent.advance({"w": torch.randn(500)})
        >>> open_packet(sent.packet(0), {"w": torch.zeros(500)})["w"].equal(sent.state["w"])
        True
    """

    def __init__(self, state: State, spec: UpdateSpec | None) -> None:
        self.state, self.number = {name: tensor.clone() for name, tensor in state.items()}, 0
        self._spec = spec
        self._updates: list[bytes] = []

    def advance(self, target: State, seed: int = 0) -> None:
        """Bring the state that clients hold near ``target``, by one message."""
        if self._spec is None:
            self.state = {name: tensor.clone() for name, tensor in target.items()}
        else:
            update = encode_update(target, self.state, self._spec, seed=seed)
            self._updates.append(update)
            self.state = decode_update(update, self.state)
            # A whole state is smaller than what is dropped here.
            while sum(map(len, self._updates)) >= state_bytes(self.state):
                del self._updates[0]
        self.number += 1

    def packet(self, held: int | None) -> Packet:
        """What a client that holds the state of a number must be sent; None for a client that holds none."""
        missed = None if held is None else self.number - held
        if missed is not None and 0 <= missed <= len(self._updates):
            updates = tuple(self._updates[len(self._updates) - missed :])
            return Packet(number=self.number, start=self.number - missed, updates=updates)
        return Packet(number=self.number, whole=dict(self.state))


def open_packet(packet: Packet, held: State | None, number: int | None = None) -> dict[str, Tensor]:
    """The state that a packet makes of the one that a client holds.

    Args:
        packet: what came.
        held: the state that the client holds, or None.
        number: of that state, if it may be a later one than the sender thought; updates it has had are passed over.

    Raises:
        FormatError: the packet has updates and the client holds nothing, or something else.
    """
    if packet.whole is not None:
        return dict(packet.whole)
    have = packet.start if number is None else number
    if held is None or not packet.start <= have <= packet.number:
        raise FormatError("update: there is no state that it could be applied to; ask for a whole one")
    state = dict(held)
    for update in packet.updates[have - packet.start :]:
        state = decode_update(update, state)
    return state


def state_bytes(state: State) -> int:
    """Bytes of a state's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
