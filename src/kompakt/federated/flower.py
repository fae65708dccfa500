"""Compression for an app of Flower, by one line in the client and one in the server; needs ``kompakt[federated]``.

    app = ClientApp(mods=[CompressionMod()])
    strategy = CompressedStrategy(FedAvg())

The app itself goes on to see whole states. Any strategy of Flower's message API is wrapped: it gets, and returns, the
weights alone; running statistics and counters, which are states and no sums, are averaged by kompakt.
"""

from kompakt.errors import MissingExtraError

try:
    from kompakt.federated.flower_client import CompressionMod
    from kompakt.federated.flower_server import CompressedStrategy
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flwr":
        raise
    raise MissingExtraError("Flower is not installed; pip install 'kompakt[federated]'") from None

__all__ = ["CompressedStrategy", "CompressionMod"]
