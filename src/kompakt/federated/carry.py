"""How packets and updates travel in Flower: bytes and integers of one record beside the app's own."""

from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from kompakt.errors import FormatError
from kompakt.federated.broadcast import Packet
from kompakt.federated.layout import State
from kompakt.federated.member import Receipt

RECORD = "kompakt"
NONE = -1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a client is asked: the packet, the round, and what became of its last updates."""

    packet: Packet
    round: int
    receipt: Receipt


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client answers.

    Args:
        held: number of the state that it holds now; None asks for a whole one.
        round: that the update is for.
        update: the message; empty where there is none.
        problem: why there is none.
    """

    held: int | None
    round: int = 0
    update: bytes = b""
    problem: str = ""


def to_state(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def to_arrays(state: State) -> ArrayRecord:
    """A record of tensors, each in its dtype."""
    return ArrayRecord({name: Array.from_numpy_ndarray(t.detach().cpu().numpy()) for name, t in state.items()})


def array_key(content: RecordDict) -> str:
    """The name of the one record of arrays.

    Raises:
        FormatError: there is none, or more than one.
    """
    keys = list(content.array_records)
    if len(keys) != 1:
        raise FormatError(f"message: {len(keys)} records of arrays; expected one, the model's state")
    return keys[0]


def write_task(content: RecordDict, task: Task) -> RecordDict:
    """A copy of a message's content with the packet in the place of the model's arrays."""
    key, packet = array_key(content), task.packet
    found = RecordDict({name: record for name, record in content.items() if name != key})
    found[key] = to_arrays(packet.whole or {})
    said = (task.receipt.taken, task.receipt.refused)
    found[RECORD] = ConfigRecord(
        {
            "round": task.round,
            "number": packet.number,
            "start": packet.start,
            "whole": packet.whole is not None,
            "updates": list(packet.updates),
            "receipt": [NONE if number is None else number for number in said],
        }
    )
    return found


def read_task(content: RecordDict) -> Task | None:
    """The task of a message; None if its sender does not compress."""
    if RECORD not in content.config_records:
        return None
    record = content.config_records[RECORD]
    taken, refused = (None if number == NONE else number for number in record["receipt"])
    packet = Packet(
        number=record["number"],
        start=record["start"],
        whole=to_state(content.array_records[array_key(content)]) if record["whole"] else None,
        updates=tuple(record["updates"]),
    )
    return Task(packet=packet, round=record["round"], receipt=Receipt(taken=taken, refused=refused))


def write_answer(answer: Answer) -> ConfigRecord:
    """The record of an answer."""
    held = NONE if answer.held is None else answer.held
    return ConfigRecord({"held": held, "round": answer.round, "update": answer.update, "problem": answer.problem[:500]})


def read_answer(content: RecordDict) -> Answer:
    """The answer in a reply.

    Raises:
        FormatError: there is none: the client does not run kompakt's mod, or sends something else.
    """
    record = content.config_records.get(RECORD, {})
    held, number, update, problem = (record.get(name) for name in ("held", "round", "update", "problem"))
    if not (
        isinstance(held, int) and isinstance(number, int) and isinstance(update, bytes) and isinstance(problem, str)
    ):
        raise FormatError("reply: no update of kompakt's in it; does the client run kompakt's mod?")
    return Answer(held=None if held == NONE else held, round=number, update=update, problem=problem)
