"""The server's half of Flower's adapter: a strategy around a strategy."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.account import write_account
from kompakt.federated.average import average_states
from kompakt.federated.carry import RECORD, Answer, Task, read_answer, to_arrays, to_state, write_task
from kompakt.federated.layout import layout_of
from kompakt.federated.limits import Limits
from kompakt.federated.server import Server, Taken
from kompakt.federated.spec import UpdateSpec

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
DOWN = UpdateSpec(ratio=25.0)


class CompressedStrategy(Strategy):
    """A strategy that sends packets and takes updates for another strategy.

    Args:
        strategy: decides who trains and what becomes of the weights: FedAvg, FedAdam, FedAvgM or another.
        down: how the downlink is coded; None sends whole states.
        limits: what a client's update may be at most.
        out: a folder for the account of bytes and scores, written after each round; None writes none.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        down: UpdateSpec | None = DOWN,
        limits: Limits | None = None,
        out: str | Path | None = None,
    ) -> None:
        self.strategy = strategy
        self.server: Server | None = None
        self._down, self._limits, self._out = down, limits, out
        self._weight = str(getattr(strategy, "weighted_by_key", "num-examples"))
        self._key = str(getattr(strategy, "arrayrecord_key", "arrays"))

    def summary(self) -> None:
        """Log the settings of the wrapped strategy."""
        self.strategy.summary()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **knobs: Any) -> Result:
        """Run the rounds; what ``evaluate_fn`` finds is kept in the account too."""
        evaluate = knobs.get("evaluate_fn")
        if evaluate is not None:
            knobs["evaluate_fn"] = self._scored(evaluate)
        return super().start(grid, initial_arrays, *args, **knobs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose; put a packet for each client in the place of the arrays."""
        server = self._advanced(arrays)
        server.begin(server_round)
        weights = set(layout_of(server.state).weights)
        part = to_arrays({name: tensor for name, tensor in server.state.items() if name in weights})
        messages = self.strategy.configure_train(server_round, part, config, grid)
        return [self._packed(server, message, update=True) for message in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the updates that can be taken and let the strategy make of them what it would of whole states."""
        assert self.server is not None
        given, errors = self._sorted(self.server, replies)
        good = [
            (message, found)
            for message, answer, found in self._alike(self.server, given)
            if self.server.receive(
                message.metadata.src_node_id, answer.round, answer.update, float(found[self._weight])
            )
            is None
        ]
        taken = self.server.close()
        self._write()
        if not good:
            return None, None
        weights = set(layout_of(self.server.state).weights)
        for message, found in good:
            state = taken[message.metadata.src_node_id].state
            part = to_arrays({name: tensor for name, tensor in state.items() if name in weights})
            message.content = RecordDict({self._key: part, "metrics": found})
        arrays, scores = self.strategy.aggregate_train(server_round, [*(message for message, _ in good), *errors])
        return (None if arrays is None else self._whole(arrays, list(taken.values()), weights)), scores

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose; put a packet for each client in the place of the arrays."""
        server = self._advanced(arrays)
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return [self._packed(server, message, update=False) for message in messages]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the strategy average the scores of those that could evaluate."""
        assert self.server is not None
        given, errors = self._sorted(self.server, replies)
        good = [message for message, _, _ in self._alike(self.server, given)]
        for message in good:
            del message.content[RECORD]
        found = self.strategy.aggregate_evaluate(server_round, [*good, *errors])
        self._score(server_round, found, "of clients")
        self._write()
        return found

    def _advanced(self, arrays: ArrayRecord) -> Server:
        state = to_state(arrays)
        if self.server is None:
            self.server = Server(state, down=self._down, limits=self._limits)
        self.server.advance(state)
        return self.server

    def _packed(self, server: Server, message: Message, *, update: bool) -> Message:
        client = message.metadata.dst_node_id
        packet = server.packet(client, update=update)
        task = Task(packet=packet, round=server.round, receipt=server.receipt(client))
        # Flower's strategies put one content into the messages of all clients: each gets its own.
        message.content = write_task(message.content, task)
        return message

    def _sorted(self, server: Server, replies: Iterable[Message]) -> tuple[list[tuple[Message, Answer]], list[Message]]:
        """Replies with an answer, and Flower's own errors; the rest is noted and left out."""
        given, errors = [], []
        for message in replies:
            client = message.metadata.src_node_id
            if message.has_error():
                server.failed(client, message.error.reason or "an error in the client")
                errors.append(message)
                continue
            try:
                answer = read_answer(message.content)
            except FormatError as error:
                server.failed(client, str(error))
                continue
            server.holds(client, answer.held)
            if answer.problem:
                server.failed(client, answer.problem)
            else:
                given.append((message, answer))
        return given, errors

    def _alike(self, server: Server, given: list[tuple[Message, Answer]]) -> list[tuple[Message, Answer, MetricRecord]]:
        """Replies with the metrics that most have: Flower's own check would end the run at any other."""
        found = [(message, answer, self._metrics(message.content)) for message, answer in given]
        sets = Counter(frozenset(metrics) for _, _, metrics in found if metrics is not None)
        common = sets.most_common(1)[0][0] if sets else frozenset()
        alike = []
        for message, answer, metrics in found:
            if metrics is None:
                reason = f"no single record of metrics with a number {self._weight!r}"
            elif frozenset(metrics) != common:
                reason = f"other metrics than most clients have: {', '.join(sorted(metrics))[:200]}"
            else:
                alike.append((message, answer, metrics))
                continue
            server.failed(message.metadata.src_node_id, reason)
        return alike

    def _metrics(self, content: RecordDict) -> MetricRecord | None:
        found = list(content.metric_records.values())
        right = len(found) == 1 and type(found[0].get(self._weight)) in (int, float)
        return found[0] if right else None

    def _whole(self, arrays: ArrayRecord, taken: list[Taken], weights: set[str]) -> ArrayRecord:
        """The strategy's weights in their dtypes, and the mean of all else, in the order of the state."""
        assert self.server is not None
        made, state = to_state(arrays), self.server.state
        rest = [{name: tensor for name, tensor in t.state.items() if name not in weights} for t in taken]
        mean: dict[str, Tensor] = average_states(rest, [t.examples for t in taken]) if rest[0] else {}
        return to_arrays({n: made[n].to(old.dtype) if n in weights else mean[n] for n, old in state.items()})

    def _scored(self, evaluate: Evaluate) -> Evaluate:
        def scored(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            found = evaluate(server_round, arrays)
            if self.server is None:
                self._advanced(arrays)
            self._score(server_round, found, "of the server")
            self._write()
            return found

        return scored

    def _score(self, server_round: int, found: MetricRecord | None, whose: str) -> None:
        assert self.server is not None
        numbers = {n: float(v) for n, v in (found or {}).items() if isinstance(v, int | float) and n != self._weight}
        self.server.ledger.score(server_round, **{f"{name} {whose}": value for name, value in numbers.items()})

    def _write(self) -> None:
        if self._out is not None and self.server is not None:
            write_account(self.server.ledger, self._out)
