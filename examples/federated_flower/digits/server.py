"""The server: as any app of Flower's, but for the strategy around the strategy."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from digits.task import accuracy, held_out, network
from kompakt.federated.flower import CompressedStrategy

app = ServerApp()
STRATEGIES = {
    "FedAvg": lambda: FedAvg(),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=1.0, server_momentum=0.5),
    "FedAdam": lambda: FedAdam(eta=0.02),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and save what the server ended with."""
    strategy = STRATEGIES[str(context.run_config["strategy"])]()
    strategy = CompressedStrategy(strategy, out=str(context.run_config["out"]))
    rounds = int(context.run_config["rounds"])
    strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=rounds, evaluate_fn=evaluate)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Score the server's model on images that no client has."""
    model = network()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(model, held_out())})
