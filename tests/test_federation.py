"""Laws of a federation, without Flower: rounds go on whatever a client does, and nothing is lost."""

import importlib
import importlib.util
import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kompakt.errors import FormatError, InputError, MissingExtraError
from kompakt.federated import Limits, Member, Server, UpdateSpec, average_states, encode_update
from kompakt.federated.account import write_account
from kompakt.federated.average import rebase
from kompakt.federated.broadcast import Broadcast, open_packet, state_bytes

State = dict[str, Tensor]
EXACT = UpdateSpec(ratio=None, bits=16, rounding="nearest", statistic_bits=12)
COARSE = UpdateSpec(ratio=None, bits=4, rounding="nearest")
SPARSE = UpdateSpec(ratio=None, bits=8, selection="top", keep=0.2, rounding="nearest")


def start() -> State:
    g = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(6, 4, 3, 3, generator=g),
        "bn.running_mean": torch.zeros(6),
        "bn.running_var": torch.ones(6),
        "bn.num_batches_tracked": torch.tensor(0),
        "used": torch.zeros(6, dtype=torch.bool),
    }


def trained(state: State, seed: int, much: float = 0.05) -> State:
    g = torch.Generator().manual_seed(seed)
    found = {name: tensor.clone() for name, tensor in state.items()}
    for name in ("conv.weight", "bn.running_mean"):
        found[name] += much * torch.randn(found[name].shape, generator=g)
    found["bn.running_var"] *= 1.25
    found["bn.num_batches_tracked"] += 3
    found["used"][seed % 6] = True
    return found


class Loop:
    """Three clients in one process, each with a folder."""

    def __init__(self, folder: Path, *, up: UpdateSpec = EXACT, down: UpdateSpec | None = EXACT) -> None:
        self.server = Server(start(), down=down)
        self.folder, self.up = folder, up
        self.number = 0

    def member(self, client: int) -> Member:
        return Member(self.folder / str(client), self.up)

    def ask(self, client: int) -> Member:
        member = self.member(client)
        member.open(self.server.packet(client), self.server.receipt(client))
        self.server.holds(client, member.number)
        return member

    def begin(self) -> dict[int, Member]:
        self.number += 1
        self.server.begin(self.number)
        return {client: self.ask(client) for client in range(3)}

    def data(self, member: Member, client: int) -> bytes:
        assert member.state is not None
        return member.encode(trained(member.state, 10 * self.number + client), self.number, seed=client)

    def end(self) -> None:
        taken = list(self.server.close().values())
        if taken:
            self.server.advance(average_states([t.state for t in taken], [t.examples for t in taken]))

    def reasons(self) -> list[str]:
        return [reason for row in self.server.ledger.data()["clients"] for reason in row["reasons"]]


def test_rounds_follow_the_mean_of_what_clients_trained(tmp_path: Path) -> None:
    loop, wanted = Loop(tmp_path), start()
    for _ in range(3):
        members = loop.begin()
        states = []
        for client, member in members.items():
            assert member.state is not None
            states.append(rebase(trained(member.state, 10 * loop.number + client), member.state, loop.server.state))
            assert loop.server.receive(client, loop.number, loop.data(member, client), 1.0 + client) is None
        wanted = average_states(states, [1.0, 2.0, 3.0])
        loop.end()
    for name, tensor in wanted.items():
        found = loop.server.state[name]
        assert found.dtype == tensor.dtype
        assert torch.allclose(found.double(), tensor.double(), atol=2e-3), name
    assert int(loop.server.state["bn.num_batches_tracked"]) == 9
    assert loop.reasons() == []


def sealed(data: bytes) -> bytes:
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def infinite(loop: Loop, base: State, good: bytes) -> bytes:
    far = {name: tensor.clone() for name, tensor in base.items()}
    far["conv.weight"] += 1e30
    return encode_update(far, base, EXACT)


def of_another_base(loop: Loop, base: State, good: bytes) -> bytes:
    return encode_update(trained(start(), 77), trained(start(), 78), EXACT)


def of_other_shapes(loop: Loop, base: State, good: bytes) -> bytes:
    other = {"conv.weight": torch.zeros(2, 2)}
    data = encode_update({"conv.weight": torch.ones(2, 2)}, other, EXACT)
    return sealed(data[:6] + good[6:22] + data[22:])


def leaping(loop: Loop, base: State, good: bytes) -> bytes:
    far = {name: tensor.clone() for name, tensor in base.items()}
    far["bn.running_var"] *= 1e6
    return encode_update(far, base, UpdateSpec(ratio=None, statistic_bits=4))


HOSTILE = {
    "its weights move": infinite,
    "another base": of_another_base,
    "block": of_other_shapes,
    "bn.running_var moves": leaping,
    "bytes, at most": lambda loop, base, good: good + bytes(2 * state_bytes(base) + 5000),
    "checksum": lambda loop, base, good: good[: len(good) // 2],
    "not an update": lambda loop, base, good: b"",
    "version": lambda loop, base, good: sealed(good[:4] + b"\7" + good[5:]),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_a_hostile_update_is_refused_with_its_reason_and_the_round_goes_on(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path)
    for _ in range(2):  # the base of the second round is another than the first state
        members = loop.begin()
        for client in (0, 1):
            assert loop.server.receive(client, loop.number, loop.data(members[client], client), 1.0) is None
        loop.server.failed(2, "trains slowly")
        loop.end()
    members = loop.begin()
    base = members[2].state
    assert base is not None
    for client in (0, 1):
        assert loop.server.receive(client, loop.number, loop.data(members[client], client), 1.0) is None
    found = loop.server.receive(2, loop.number, HOSTILE[reason](loop, base, loop.data(members[2], 2)), 1.0)
    assert found is not None
    assert reason in found
    assert found in caplog.text
    assert found in loop.reasons()
    assert set(loop.server.close()) == {0, 1}
    assert loop.server.receipt(2).refused == loop.number
    # What was refused for its content is not sent again: it would be refused for ever.
    loop.end()
    assert loop.begin()[2].feedback.residual == {}


@pytest.mark.parametrize(
    ("examples", "reason"), [(0.0, "no examples"), (float("nan"), "nan examples"), (1e12, "expected 0 to")]
)
def test_weights_that_are_none_are_not_taken(examples: float, reason: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    members = loop.begin()
    assert loop.server.receive(0, 1, loop.data(members[0], 0), 1.0) is None
    found = loop.server.receive(1, 1, loop.data(members[1], 1), examples)
    assert found is not None
    assert reason in found
    assert set(loop.server.close()) == {0}


def test_duplicate_late_unasked_and_missing_updates_leave_the_round_whole(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    members = loop.begin()
    late = loop.data(members[2], 2)
    data = loop.data(members[0], 0)
    assert loop.server.receive(0, 1, data, 1.0) is None
    assert "second update" in str(loop.server.receive(0, 1, data, 1.0))
    assert "not asked for" in str(loop.server.receive("a stranger", 1, data, 1.0))
    loop.end()  # clients 1 and 2 dropped
    assert loop.reasons().count("no answer came before the round ended") == 2
    members = loop.begin()
    assert "made for round 1, this is round 2" in str(loop.server.receive(2, 1, late, 1.0))
    assert loop.server.receive(2, 2, loop.data(members[2], 2), 1.0) is None
    loop.end()
    assert loop.server.round == 2


def test_a_round_without_any_update_changes_nothing(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    before = {name: tensor.clone() for name, tensor in loop.server.state.items()}
    loop.end()
    assert all(torch.equal(before[name], tensor) for name, tensor in loop.server.state.items())
    members = loop.begin()
    assert loop.server.receive(0, 2, loop.data(members[0], 0), 1.0) is None


def test_what_was_not_taken_arrives_later_even_across_restarts(tmp_path: Path) -> None:
    loop = Loop(tmp_path, up=SPARSE)
    goal = trained(start(), 5)
    for number in range(1, 14):
        loop.server.begin(number)
        member = loop.ask(0)  # read from the disk each time
        assert member.state is not None
        new = goal if number == 1 else member.state  # it trains once, and then only has a residual
        data = member.encode(new, number)
        if number not in (1, 3):  # two messages are lost on the way
            assert loop.server.receive(0, number, data, 1.0) is None
        loop.end()
    error = (loop.server.state["conv.weight"] - goal["conv.weight"]).abs().max()
    assert float(error) < 0.01 < float((start()["conv.weight"] - goal["conv.weight"]).abs().max())


def test_a_client_that_lost_its_folder_or_missed_rounds_is_brought_up_to_date(tmp_path: Path) -> None:
    loop = Loop(tmp_path, down=COARSE)
    loop.begin()
    whole = state_bytes(start())
    for number in range(2, 5):
        loop.server.begin(number)
        member = loop.ask(0)
        assert loop.server.receive(0, number, member.encode(trained(member.state or {}, number), number), 1.0) is None
        loop.end()
    missed = loop.server.packet(1)
    assert missed.whole is None
    assert (missed.start, len(missed.updates)) == (0, 3)
    for file in (tmp_path / "1").iterdir():
        file.unlink()
    with pytest.raises(FormatError, match="ask for a whole one"):
        loop.member(1).open(missed)
    loop.server.holds(1, None)
    again = loop.server.packet(1)
    assert again.size_bytes == whole
    assert torch.equal(loop.member(1).open(again)["conv.weight"], (loop.ask(0).state or {})["conv.weight"])


def test_updates_that_a_client_has_had_are_passed_over() -> None:
    sent = Broadcast(start(), COARSE)
    states = [start()]
    for seed in range(3):
        sent.advance(trained(start(), seed))
        states.append(sent.state)
    packet = sent.packet(1)
    assert torch.equal(open_packet(packet, states[2], 2)["conv.weight"], sent.state["conv.weight"])
    with pytest.raises(FormatError, match="another base"):
        open_packet(packet, states[2], 1)


def test_a_damaged_held_state_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "held.safetensors").write_bytes(b"no")
    with pytest.raises(FormatError, match="delete it"):
        Member(tmp_path)


def test_means_keep_dtypes_and_counters() -> None:
    one, two = (
        {"n": torch.tensor(3), "b": torch.tensor([True, False])},
        {"n": torch.tensor(6), "b": torch.tensor([True, True])},
    )
    found = average_states([one, two], [1.0, 2.0])
    assert found["n"].equal(torch.tensor(5))
    assert found["b"].tolist() == [True, True]
    for weights in ([0.0, 0.0], [-1.0, 3.0]):
        with pytest.raises(InputError, match="weight above 0"):
            average_states([one, two], weights)


def test_limits_out_of_range_are_one_line() -> None:
    with pytest.raises(InputError, match="change"):
        Limits(change=0)


def test_the_account_has_every_byte(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "clients")
    sizes = []
    for _ in range(2):
        members = loop.begin()
        for client, member in members.items():
            data = loop.data(member, client)
            sizes.append(len(data))
            assert loop.server.receive(client, loop.number, data, 1.0) is None
        loop.end()
        loop.server.ledger.score(loop.number, accuracy=0.5 * loop.number)
    write_account(loop.server.ledger, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "federated.json").read_text())
    assert data["totals"]["up_bytes"] == sum(sizes)
    assert data["clients"][0]["down_bytes"] == state_bytes(start())
    assert data["scores"] == [{"round": 1, "accuracy": 0.5}, {"round": 2, "accuracy": 1.0}]
    page = (tmp_path / "out" / "federated.html").read_text()
    assert f"{sum(sizes):,}" in page
    assert page.count("<svg") == 2
    assert (tmp_path / "out" / "federated-bytes.svg").read_text().startswith("<svg")


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_the_adapter_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"kompakt\[federated\]"):
        importlib.import_module("kompakt.federated.flower")
