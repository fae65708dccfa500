"""A server's side of the rounds, whatever carries the messages: packets out, updates in, a reason for each refusal."""

import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.average import rebase
from kompakt.federated.broadcast import Broadcast, Packet
from kompakt.federated.decode import decode_update
from kompakt.federated.layout import State
from kompakt.federated.ledger import Ledger
from kompakt.federated.limits import Limits, check_change, check_size
from kompakt.federated.member import Receipt
from kompakt.federated.spec import UpdateSpec

LOG = logging.getLogger("kompakt.federated")


@dataclass(frozen=True, kw_only=True)
class Taken:
    """An update that goes into the mean.

    Args:
        state: what the client's change makes of the server's own state.
        examples: its weight.
    """

    state: dict[str, Tensor]
    examples: float


class Server:
    """Rounds of a federation: who holds what, whose update was taken, and why one was not.

    Nothing that a client does ends a round: each update is taken or refused with a reason, which is logged and kept in
    the ledger, and what was not taken is sent again by the client's feedback.

    Args:
        state: the first state.
        down: how the downlink is coded; None sends whole states.
        limits: what a client's update may be at most.
    """

    def __init__(self, state: State, *, down: UpdateSpec | None = None, limits: Limits | None = None) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.ledger = Ledger()
        self.round = 0
        self._sent = Broadcast(state, down)
        self._limits = limits or Limits()
        self._held: dict[Hashable, int] = {}
        self._taken: dict[Hashable, int] = {}
        self._refused: dict[Hashable, int] = {}
        self._asked: set[Hashable] = set()
        self._updates: dict[Hashable, Taken] = {}

    def begin(self, number: int) -> None:
        """Open a round; numbers rise."""
        self.round, self._asked, self._updates = number, set(), {}

    def advance(self, state: State) -> None:
        """Take a new state as the server's own; clients get it with their next packet."""
        same = list(state) == list(self.state) and all(state[name].equal(self.state[name]) for name in state)
        if not same:
            self.state = {name: tensor.clone() for name, tensor in state.items()}
            self._sent.advance(self.state, seed=self.round)

    def packet(self, client: Hashable, *, update: bool = True) -> Packet:
        """What to send to a client.

        Args:
            client: any name of it that stays the same.
            update: whether it is asked for an update in return (or only to evaluate).
        """
        found = self._sent.packet(self._held.get(client))
        self.ledger.sent(self.round, client, found.size_bytes)
        if update:
            self._asked.add(client)
        return found

    def receipt(self, client: Hashable) -> Receipt:
        """What to tell a client of its last updates."""
        return Receipt(taken=self._taken.get(client), refused=self._refused.get(client))

    def holds(self, client: Hashable, number: int | None) -> None:
        """Note which state a client says that it holds; None if it lost it: then it is sent a whole one."""
        if number is not None and 0 <= number <= self._sent.number:
            self._held[client] = number
        else:
            self._held.pop(client, None)

    def receive(self, client: Hashable, number: int, data: bytes, examples: float) -> str | None:
        """Take a client's update into the mean of the round, or return the reason why not.

        Args:
            client: as in ``packet``.
            number: of the round that the client made it for.
            data: the message.
            examples: how many the client trained on.
        """
        reason = self._untimely(client, number, examples)
        if reason is None:
            try:
                check_size(data, self._sent.state, self._limits)
                found = decode_update(data, self._sent.state)
                check_change(found, self._sent.state, self._limits)
            except FormatError as error:
                reason = str(error)
                self._refused[client] = number
            else:
                state = rebase(found, self._sent.state, self.state)
                self._updates[client] = Taken(state=state, examples=examples)
                self._taken[client] = number
        self.ledger.received(self.round, client, len(data), reason)
        if reason is not None:
            LOG.warning("round %d, client %s: not taken: %s", self.round, client, reason)
        return reason

    def failed(self, client: Hashable, reason: str) -> None:
        """Note that a client has no update to give, and why."""
        self.ledger.received(self.round, client, 0, reason)
        LOG.warning("round %d, client %s: no update: %s", self.round, client, reason)

    def close(self) -> dict[Hashable, Taken]:
        """End the round: what was taken, by client; those that did not answer are noted."""
        for client in sorted(self._asked - self.ledger.answered(self.round), key=str):
            self.failed(client, "no answer came before the round ended")
        self._asked = set()
        return self._updates

    def _untimely(self, client: Hashable, number: int, examples: float) -> str | None:
        """Why an update cannot be of this round, however good it is."""
        if number != self.round or client not in self._asked:
            return f"made for round {number}, this is round {self.round}" if number != self.round else "not asked for"
        if client in self._updates:
            return "a second update in one round"
        if not math.isfinite(examples) or not 0 <= examples <= self._limits.examples:
            return f"{examples} examples; expected 0 to {self._limits.examples:,}"
        return "no examples, so no weight in the mean" if examples == 0 else None
