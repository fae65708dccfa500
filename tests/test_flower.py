"""Flower's adapter: whole apps in one process, as a simulation, and as processes on loopback; skipped without flwr."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import kompakt

pytest.importorskip("flwr", reason="Flower is not installed (pip install 'kompakt[federated]')")
# Flower warns at its own imports.
pytestmark = pytest.mark.filterwarnings("default")

from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from kompakt.federated import UpdateSpec  # noqa: E402
from kompakt.federated.flower import CompressedStrategy, CompressionMod  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
EXACT = UpdateSpec(ratio=None, bits=16, rounding="nearest", statistic_bits=12)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_learning_rate=1.0, server_momentum=0.5),
    "FedAdam": lambda: FedAdam(eta=0.01),
}
Reply = Callable[[Message, int], Message]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def make_app(mods: list[CompressionMod]) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        g = torch.Generator().manual_seed(int(message.content["config"]["server-round"]) * 10 + context.node_id)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(9, 8, generator=g)), torch.arange(9) % 3).backward()
            optimizer.step()
        metrics = MetricRecord({"loss": 1.0, "num-examples": 9})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        network().load_state_dict(message.content["arrays"].to_torch_state_dict())
        return Message(RecordDict({"metrics": MetricRecord({"accuracy": 0.5, "num-examples": 9})}), reply_to=message)

    return app


class Grid:
    """Two nodes of one process; ``spoil`` may change what the second sends back."""

    def __init__(self, app: ClientApp, spoil: Reply | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1
        self.app, self.spoil = app, spoil

    def get_node_ids(self) -> list[int]:
        return [11, 12]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        found = []
        for message in sorted(messages, key=lambda one: one.metadata.dst_node_id):  # strategies draw an order
            node = message.metadata.dst_node_id
            context = Context(
                run_id=5, node_id=node, node_config={"partition-id": node - 11}, state=RecordDict(), run_config={}
            )
            reply = self.app(message, context)
            spoilt = self.spoil is not None and node == 12 and message.metadata.message_type == "train"
            found.append(self.spoil(reply, node) if spoilt and self.spoil else reply)
        return found


def run(strategy: Strategy, grid: Grid, rounds: int = 3) -> dict[str, torch.Tensor]:
    result = strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=rounds)  # type: ignore[arg-type]
    return dict(result.arrays.to_torch_state_dict())


@pytest.mark.parametrize("name", STRATEGIES)
def test_fine_steps_make_the_weights_of_an_uncompressed_run(name: str, tmp_path: Path) -> None:
    plain = run(STRATEGIES[name](), Grid(make_app([])))
    strategy = CompressedStrategy(STRATEGIES[name](), down=EXACT)
    found = run(strategy, Grid(make_app([CompressionMod(EXACT, tmp_path)])))
    assert list(found) == list(network().state_dict())
    for key, tensor in network().state_dict().items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
    for key in ("0.weight", "3.weight", "3.bias"):
        assert torch.allclose(found[key], plain[key].float(), atol=2e-3), key
    assert int(found["1.num_batches_tracked"]) == 9
    assert bool((found["1.running_var"] > 0).all())
    if name == "FedAvg":
        assert torch.allclose(found["1.running_var"], plain["1.running_var"].float(), rtol=2e-3)
    totals = strategy.server.ledger.data()["totals"] if strategy.server else {}
    assert totals["up_bytes"] > 0
    assert totals["down_bytes"] > 0


def error_of(reply: Message, node: int) -> Message:
    return Message(metadata=reply.metadata, error=Error(code=0, reason="out of memory"))


def foreign(reply: Message, node: int) -> Message:
    reply.content = RecordDict({"arrays": ArrayRecord(network().state_dict())})
    return reply


def cut(reply: Message, node: int) -> Message:
    record = reply.content["kompakt"]
    record["update"] = record["update"][:-9]
    return reply


def no_weight(reply: Message, node: int) -> Message:
    reply.content["metrics"] = MetricRecord({"loss": 1.0})
    return reply


def no_data(reply: Message, node: int) -> Message:
    reply.content["metrics"] = MetricRecord({"loss": 1.0, "num-examples": 0})
    return reply


def other_metrics(reply: Message, node: int) -> Message:
    reply.content["metrics"] = MetricRecord({"other": 1.0, "num-examples": 9})
    return reply


SPOILT = {"out of memory": error_of, "does the client run": foreign, "checksum": cut, "single record": no_weight,
          "no examples": no_data, "other metrics than most": other_metrics}  # fmt: skip


@pytest.mark.parametrize("reason", SPOILT)
def test_a_round_goes_on_with_the_others(reason: str, tmp_path: Path) -> None:
    strategy = CompressedStrategy(FedAvg(), down=EXACT)
    run(strategy, Grid(make_app([CompressionMod(EXACT, tmp_path)]), SPOILT[reason]), rounds=2)
    assert strategy.server is not None
    rows = strategy.server.ledger.data()["clients"]
    spoilt = [row for row in rows if row["client"] == "12" and row["round"] > 0]
    assert all(reason in row["reasons"][0] for row in spoilt)
    assert not any(row["reasons"] for row in rows if row["client"] == "11")


def test_a_client_that_lost_its_memory_is_sent_a_whole_state(tmp_path: Path) -> None:
    strategy = CompressedStrategy(FedAvg(fraction_evaluate=0.0), down=EXACT)

    def forget(reply: Message, node: int) -> Message:
        for file in (tmp_path / "run-5" / "1").iterdir():
            file.unlink()
        return reply

    run(strategy, Grid(make_app([CompressionMod(EXACT, tmp_path)]), forget), rounds=4)
    assert strategy.server is not None
    rows = [row for row in strategy.server.ledger.data()["clients"] if row["client"] == "12"]
    assert [bool(row["reasons"]) for row in rows] == [False, True, False, True]
    assert "ask for a whole one" in rows[1]["reasons"][0]


def test_a_server_that_does_not_compress_is_served_too(tmp_path: Path) -> None:
    found = run(FedAvg(), Grid(make_app([CompressionMod(EXACT, tmp_path)])))
    assert torch.equal(found["0.weight"], run(FedAvg(), Grid(make_app([])))["0.weight"])


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.mark.parametrize("mode", [pytest.param("simulation", marks=needs_ray), "deployment"])
def test_the_example_runs_and_leaves_no_process(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.federated_flower.run", "--out", str(tmp_path / "out"), "--rounds", "2"]
    command += ["--deployment"] if mode == "deployment" else []
    paths = os.pathsep.join([str(Path(kompakt.__file__).parents[1]), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "STARTED_BY": str(tmp_path)}  # found again in what is left running
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    account = json.loads((tmp_path / "out" / "federated.json").read_text())
    assert [row["round"] for row in account["scores"]] == [0, 1, 2]
    assert len({row["client"] for row in account["clients"]}) == 2
    assert not any(row["reasons"] for row in account["clients"])
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path) in _text(path)]
    assert not left, left


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
