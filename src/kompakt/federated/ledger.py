"""The account of a federation: bytes down and up, of each round and client, and what the model scored."""

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Row:
    """One client in one round.

    Args:
        round, client: which.
        down_bytes, up_bytes: what was sent to it and what came.
        messages: how many updates came.
        reasons: why updates were not taken.
    """

    round: int
    client: str
    down_bytes: int = 0
    up_bytes: int = 0
    messages: int = 0
    reasons: tuple[str, ...] = ()


class Ledger:
    """Rows by round and client, and scores by round."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, Hashable], Row] = {}
        self._scores: dict[int, dict[str, float]] = {}

    def sent(self, number: int, client: Hashable, size_bytes: int) -> None:
        """Add what was sent to a client."""
        self._row(number, client).down_bytes += size_bytes

    def received(self, number: int, client: Hashable, size_bytes: int, reason: str | None) -> None:
        """Add what came of a client; a reason if it was not taken."""
        row = self._row(number, client)
        row.up_bytes += size_bytes
        row.messages += 1
        row.reasons += (reason,) if reason is not None else ()

    def score(self, number: int, **scores: float) -> None:
        """Add what the model of a round scored."""
        self._scores.setdefault(number, {}).update(scores)

    def answered(self, number: int) -> set[Hashable]:
        """Clients of which anything came in a round."""
        return {client for (of, client), row in self._rows.items() if of == number and row.messages}

    def data(self) -> dict[str, Any]:
        """Rows, totals and scores, for JSON."""
        rows = [asdict(row) for row in self._rows.values()]
        totals = {name: sum(row[name] for row in rows) for name in ("up_bytes", "down_bytes")}
        scores = [{"round": number, **found} for number, found in sorted(self._scores.items())]
        return {"totals": totals, "scores": scores, "clients": rows}

    def _row(self, number: int, client: Hashable) -> Row:
        return self._rows.setdefault((number, client), Row(number, str(client)))
