"""Updates of a federation, coded: python -m benchmarks.federated [--long] [--mnist DIR] [--cifar DIR].

Ten clients, all in every round, federated averaging; the same start, partition and batches for every coder. The short
form is LeNet-5 and a small network with batch norms on MNIST, three seeds; ``--long`` is ResNet-20 on CIFAR-10 from a
warm start. Cells are written as they are done to ``results/federated/NETWORK.jsonl`` and not measured again; ``--page``
writes docs/federated.md from them. Where NNCodec is installed, its cells are measured too.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.federated_coders import DOWN, MAKERS, PLAIN, State
from benchmarks.federated_data import SETTINGS, Setting, Subject, load_subject, partition, start_of
from benchmarks.federated_page import write_page
from benchmarks.federated_same import same_updates
from kompakt.federated.average import Momentum, average_states, rebase
from kompakt.federated.broadcast import Broadcast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "federated"
PARTITIONS = ("dirichlet", "iid")
BETA = 0.3


def accuracy(model: nn.Module, examples: tuple[Tensor, Tensor]) -> float:
    """Share of examples that are classified rightly, in per cent."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in examples[0].split(500)])
    return 100 * float((found == examples[1]).float().mean())


def train(model: nn.Module, examples: tuple[Tensor, Tensor], setting: Setting, seed: int) -> None:
    """One local epoch; a last batch of one example is left out (batch norms need two)."""
    inputs, labels = examples
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), setting.rate, setting.momentum)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(setting.batch):
        if len(batch) > 1:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def federation(subject: Subject, setting: Setting, kind: str, coder: str, seed: int) -> dict[str, Any]:
    """One cell: all rounds under one coder."""
    model = start_of(subject.network, seed)
    state = copied(model)
    parts = partition(subject.train[1], setting, kind, seed)
    coders = [MAKERS[coder]() for _ in parts]
    sent = Broadcast(state, DOWN if "both" in coder else None)
    momentum = Momentum(0.0 if coder in PLAIN else BETA)
    up, down, curve, times = [], [], [accuracy(model, subject.validation)], [0.0, 0.0]
    for number in range(setting.rounds):
        down.append(sent.packet(number - 1 if number else None).size_bytes)
        arrived, sizes = [], []
        for client, part in enumerate(parts):
            if not len(part):
                continue
            model.load_state_dict(sent.state)
            begun = time.process_time()
            train(model, (subject.train[0][part], subject.train[1][part]), setting, 1000 * seed + 100 * number + client)
            trained = time.process_time()
            size, code_s, found = coders[client](copied(model), sent.state, 100 * number + client)
            times = [times[0] + trained - begun, times[1] + code_s]
            sizes.append(size)
            arrived.append((rebase(found, sent.state, state), len(part)))
        mean = average_states([found for found, _ in arrived], [float(weight) for _, weight in arrived])
        state = momentum.step(state, mean)
        sent.advance(state, seed=number)
        model.load_state_dict(state)
        up.append(sizes)
        curve.append(accuracy(model, subject.validation))
        print(f"{subject.network} {kind} {coder} seed {seed}: round {number + 1}, {curve[-1]:.2f} %", flush=True)
    return {"validation": curve, "test": accuracy(model, subject.test), "up_bytes": up, "down_bytes": down,
            "train_s": times[0], "encode_s": times[1]}  # fmt: skip


def run(network: str, folder: str, coders: Sequence[str], seeds: Sequence[int]) -> None:
    """All cells of one network that are not there yet."""
    path, setting = RESULTS / f"{network}.jsonl", SETTINGS[network]
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = [{"partition": kind, "seed": seed, "coder": coder}
            for seed in seeds for kind in PARTITIONS for coder in coders]  # fmt: skip
    missing = [key for key in keys if not any(key.items() <= cell.items() for cell in done)]
    subject = load_subject(network, folder) if missing else None
    for key in missing:
        assert subject is not None
        cell = key | federation(subject, setting, key["partition"], key["coder"], key["seed"])
        with path.open("a") as file:
            file.write(json.dumps(cell) + "\n")


def compare(network: str, folder: str) -> None:
    """The same updates under both coders, once."""
    path = RESULTS / "same-updates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if network not in found:
        found[network] = same_updates(load_subject(network, folder), SETTINGS[network], train)
        path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="ResNet-20 on CIFAR-10 too")
    parser.add_argument("--page", action="store_true", help="only write docs/federated.md")
    parser.add_argument("--same", action="store_true", help="only the same updates under both coders")
    parser.add_argument("--mnist", default="/tmp/mnist")
    parser.add_argument("--cifar", default="/tmp/data")
    parser.add_argument("--networks", nargs="+", default=None, choices=list(SETTINGS))
    parser.add_argument("--coders", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = arguments.networks or ["lenet5", "bnnet", *(["resnet20"] if arguments.long else [])]
    for network in [] if arguments.page else chosen:
        long = network == "resnet20"
        if importlib.util.find_spec("nncodec"):
            compare(network, arguments.cifar if long else arguments.mnist)
        if arguments.same:
            continue
        seeds = arguments.seeds or ([0] if long else [0, 1, 2])
        run(network, arguments.cifar if long else arguments.mnist, arguments.coders, seeds)
    write_page(RESULTS, ROOT / "docs")


if __name__ == "__main__":
    main()
