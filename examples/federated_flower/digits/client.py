"""The client: as any app of Flower's, but for the mod."""

import os

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import accuracy, examples, network, train
from kompakt.federated import UpdateSpec
from kompakt.federated.flower import CompressionMod

FOLDER = os.environ.get("DIGITS_CLIENTS", ".kompakt-federated")
app = ClientApp(mods=[CompressionMod(UpdateSpec(ratio=50.0), FOLDER)])


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the model that came on this client's part."""
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = _part(context)
    loss = train(model, data, seed=int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"loss": loss, "num-examples": len(data[1])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    """Score the model that came on this client's part."""
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = _part(context)
    metrics = MetricRecord({"accuracy": accuracy(model, data), "num-examples": len(data[1])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _part(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    return examples(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
