"""Laws of updates: what a receiver holds, what a sender remembers, what is refused."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kompakt.coding.wire import Cursor
from kompakt.errors import FormatError, InputError
from kompakt.federated import Feedback, Momentum, UpdateSpec, decode_update, encode_update, hash_state
from kompakt.federated.grid import classify, grid_of, live
from kompakt.federated.sparse import geometric, read_sparse, write_sparse
from kompakt.zoo import resnet20

EIGHT = UpdateSpec(ratio=None, bits=8, rounding="nearest")
TOP = UpdateSpec(ratio=None, selection="top", keep=0.1, rounding="nearest")
RANDOM = UpdateSpec(ratio=None, selection="random", keep=0.25, rounding="stochastic")
ABOVE = UpdateSpec(ratio=None, selection="threshold", threshold=1.5, rounding="nearest")
SPECS = [UpdateSpec(), UpdateSpec(ratio=8, rounding="stochastic"), EIGHT, TOP, RANDOM, ABOVE]
State = dict[str, Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, generator=g).to(dtype),
        "bn.weight": torch.randn(8, generator=g).to(dtype),
        "bn.running_mean": torch.randn(8, generator=g).to(dtype),
        "bn.running_var": (torch.rand(8, generator=g) + 0.1).to(dtype),
        "bn.num_batches_tracked": torch.tensor(seed * 7 - 3),
        "mask": torch.rand(5, generator=g) > 0.5,
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.randn((), generator=g).to(dtype),
    }


def near(base: State, seed: int) -> State:
    other = state(seed, base["conv.weight"].dtype)
    return {n: ((t + 0.1 * other[n]).to(t.dtype) if t.is_floating_point() else other[n]) for n, t in base.items()}


WEIGHTS = ("conv.weight", "bn.weight", "scalar")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_arrives_and_the_residual_make_the_difference(spec: UpdateSpec, dtype: torch.dtype) -> None:
    base = state(0, dtype)
    new, feedback = near(base, 1), Feedback()
    found = decode_update(encode_update(new, base, spec, feedback=feedback, seed=5), base)
    assert list(found) == list(base)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (base[name].shape, base[name].dtype)
    for name in ("bn.num_batches_tracked", "mask", "empty"):
        assert torch.equal(found[name], new[name])
    slack = 8 * torch.finfo(dtype).eps
    for name in WEIGHTS:
        whole = found[name].double() + feedback.residual[name].double()
        assert torch.allclose(whole, new[name].double(), atol=slack * 4, rtol=slack), name


@pytest.mark.parametrize("spec", SPECS)
def test_equal_inputs_make_equal_bytes_and_nothing_is_changed(spec: UpdateSpec) -> None:
    base, new = state(0), near(state(0), 1)
    before = hash_state(base), hash_state(new)
    first = encode_update(new, base, spec, seed=1)
    assert first == encode_update(new, base, spec, seed=1)
    decode_update(first, base)
    assert (hash_state(base), hash_state(new)) == before


def test_statistics_follow_within_half_a_step_and_variances_stay_positive() -> None:
    base, new = state(0), near(state(0), 1)
    new["bn.running_var"] = torch.tensor([0.0, 1e-8, 100.0, *base["bn.running_var"][3:].tolist()])
    found = decode_update(encode_update(new, base, EIGHT), base)
    half = 2.0**-EIGHT.statistic_bits / 2
    limit = half * (base["bn.running_var"] + 1e-5).sqrt() * 1.001
    assert bool(((found["bn.running_mean"] - new["bn.running_mean"]).abs() <= limit).all())
    moved = (found["bn.running_var"] - new["bn.running_var"]).abs()[2:]
    assert bool((moved <= half * 1.001 * base["bn.running_var"][2:]).all())
    assert bool((found["bn.running_var"] > 0).all())


@pytest.mark.parametrize("ratio", [10, 30, 100])
@pytest.mark.parametrize("rounding", ["nearest", "rate-distortion"])
def test_a_ratio_is_kept_and_used(ratio: float, rounding: str) -> None:
    base, new = trained()
    size = len(encode_update(new, base, UpdateSpec(ratio=ratio, rounding=rounding)))  # type: ignore[arg-type]
    room = sum(t.numel() * t.element_size() for t in base.values()) / ratio
    assert 0.85 * room <= size <= room


def test_rate_and_distortion_lose_less_than_rounding_at_the_same_ratio() -> None:
    base, new = trained()
    errors = []
    for rounding in ("rate-distortion", "nearest"):
        spec = UpdateSpec(ratio=100, rounding=rounding)  # type: ignore[arg-type]
        found = decode_update(encode_update(new, base, spec), base)
        errors.append(sum(float((found[n] - new[n]).square().sum()) for n in base if n.endswith("weight")))
    assert errors[0] < errors[1]


def trained() -> tuple[State, State]:
    torch.manual_seed(0)
    model = resnet20()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(32, 3, 16, 16)), torch.arange(32) % 10).backward()
        optimizer.step()
    return base, model.state_dict()


def test_what_was_not_sent_is_sent_later() -> None:
    target, base, feedback = near(state(0), 1), state(0), Feedback()
    goal, gap = target, []
    for _ in range(12):
        base = decode_update(encode_update(goal, base, TOP, feedback=feedback), base)
        gap.append(float((base["conv.weight"] - target["conv.weight"]).abs().max()))
        goal = base  # the client trains no further: only the residual is left
    assert gap[-1] < 0.2 * gap[0]


def test_the_residual_survives_a_restart(tmp_path: Path) -> None:
    base, feedback = state(0), Feedback()
    middle = decode_update(encode_update(near(base, 1), base, feedback=feedback), base)
    feedback.save(tmp_path / "client.safetensors")
    again = Feedback.load(tmp_path / "client.safetensors")
    new = near(middle, 2)
    assert encode_update(new, middle, feedback=again) == encode_update(new, middle, feedback=feedback)
    assert Feedback.load(tmp_path / "none.safetensors").residual == {}


def test_a_refused_message_is_not_lost(tmp_path: Path) -> None:
    base, new, feedback = state(0), near(state(0), 1), Feedback()
    encode_update(new, base, TOP, feedback=feedback)
    feedback.save(tmp_path / "f")
    feedback = Feedback.load(tmp_path / "f")
    feedback.settle(accepted=False)
    for name in WEIGHTS:
        assert torch.allclose(feedback.residual[name], new[name] - base[name], atol=1e-6)
    kept = {name: tensor.clone() for name, tensor in feedback.residual.items()}
    feedback.settle(accepted=False)
    assert all(torch.equal(kept[name], feedback.residual[name]) for name in kept)


def test_a_damaged_feedback_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"no safetensors")
    with pytest.raises(FormatError, match="not a saved feedback"):
        Feedback.load(tmp_path / "f")


def test_a_failed_encoding_leaves_the_feedback() -> None:
    base, feedback = state(0), Feedback()
    bad = near(base, 1) | {"scalar": torch.tensor(float("nan"))}
    with pytest.raises(InputError, match="scalar: not finite"):
        encode_update(bad, base, feedback=feedback)
    assert feedback.residual == {}
    assert feedback.sent == {}


def test_states_that_differ_are_refused() -> None:
    base = state(0)
    with pytest.raises(InputError, match="mask"):
        encode_update({n: t for n, t in base.items() if n != "mask"}, base)
    with pytest.raises(InputError, match="expected as in the base"):
        encode_update(base | {"scalar": torch.zeros(1)}, base)


@pytest.mark.parametrize("change", ["value", "shape", "name", "dtype"])
def test_another_base_is_refused(change: str) -> None:
    base = state(0)
    data = encode_update(near(base, 1), base)
    other = dict(base)
    scalar = base["scalar"]
    changes = {"value": scalar + 1, "shape": scalar[None], "dtype": scalar.double()}
    other["scalar"] = changes.get(change, scalar)
    if change == "name":
        other["other"] = other.pop("scalar")
    with pytest.raises(FormatError, match="another base"):
        decode_update(data, other)


def sealed(data: bytes) -> bytes:
    """The message as a hostile sender would close it: with the right checksum."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def test_every_truncation_is_refused_even_with_the_right_checksum() -> None:
    base = state(0)
    data = encode_update(near(base, 1), base, EIGHT)
    for end in range(0, len(data) - 1, 7):
        for message in (data[:end], sealed(data[: end + 4]) if end > 27 else b""):
            with pytest.raises(FormatError):
                decode_update(message, base)
    with pytest.raises(FormatError):
        decode_update(sealed(data + b"\0"), base)


def test_steps_that_overflow_are_refused() -> None:
    big = {"w": torch.full((64,), 3e38)}
    base = {"w": torch.zeros(64)}
    data = encode_update(big, base, EIGHT)
    assert bool(decode_update(data, base)["w"].isfinite().all())
    halves = {"w": torch.full((64,), 6e4, dtype=torch.float16)}
    lower = {"w": torch.zeros(64, dtype=torch.float16)}
    message = encode_update(halves, lower, EIGHT)
    moved = {"w": torch.full((64,), 3e4, dtype=torch.float16)}
    hostile = sealed(message[:6] + hash_state(moved) + message[22:])
    with pytest.raises(FormatError, match="not finite"):
        decode_update(hostile, moved)


def assert_refused_or_whole(message: bytearray, base: dict[str, torch.Tensor]) -> None:
    """A message with a right checksum is refused, or makes a finite state of the base's shapes and types."""
    try:
        found = decode_update(sealed(bytes(message)), base)
    except FormatError:
        return
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (base[name].shape, base[name].dtype)
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([EIGHT, TOP, RANDOM]), st.data())
def test_hostile_bytes_are_refused_or_make_a_state_of_the_base_shape(spec: UpdateSpec, data: st.DataObject) -> None:
    base = state(0)
    message = bytearray(encode_update(near(base, 1), base, spec))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(4, len(message) - 1))] = data.draw(st.integers(0, 255))
    assert_refused_or_whole(message, base)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4),
    st.sampled_from(SPECS),
    st.integers(0, 2**63),
)
def test_any_shapes_return(shapes: list[list[int]], spec: UpdateSpec, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base = {f"t{i}": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}
    new = {name: tensor + torch.randn(tensor.shape, generator=g) for name, tensor in base.items()}
    feedback = Feedback()
    found = decode_update(encode_update(new, base, spec, feedback=feedback, seed=seed), base)
    assert all(torch.allclose(found[n] + feedback.residual[n], new[n], atol=1e-5) for n in base)


def test_a_large_tensor_goes_in_pieces() -> None:
    base = {"w": torch.zeros(2**21 + 5), "n": torch.zeros((), dtype=torch.int64)}
    new = {"w": torch.zeros(2**21 + 5), "n": torch.tensor(2**62)}
    new["w"][::1000] = 1.0
    found = decode_update(encode_update(new, base, EIGHT), base)
    assert torch.equal(found["n"], new["n"])
    assert float((found["w"] - new["w"]).abs().max()) < 0.05


def test_the_downlink_loses_nothing_without_feedback() -> None:
    held, target = state(0), near(state(0), 1)
    # A tenth each time: after ten rounds every value was sent once.
    for _ in range(12):
        held = decode_update(encode_update(target, held, TOP), held)
    assert float((held["conv.weight"] - target["conv.weight"]).abs().max()) < 0.02


@pytest.mark.parametrize(
    "knobs", [{"ratio": 0.5}, {"bits": 1}, {"keep": 0.0}, {"selection": "best"}, {"rounding": "up"}]
)
def test_a_spec_out_of_range_is_one_line(knobs: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(knobs))):
        UpdateSpec(**knobs)  # type: ignore[arg-type]


def test_a_ratio_warms_up_by_rounds() -> None:
    spec = UpdateSpec(ratio=160, warm_up=4)
    found = [spec.at(number).ratio for number in range(1, 7)]
    assert found == pytest.approx([40, 40 * 2**0.5, 80, 80 * 2**0.5, 160, 160])
    assert UpdateSpec(ratio=2, warm_up=3).at(1).ratio == 1
    assert UpdateSpec(ratio=None, warm_up=3).at(1).ratio is None


def test_the_rate_of_the_last_message_keeps_the_ratio_of_the_next() -> None:
    base, new = trained()
    feedback = Feedback()
    encode_update(new, base, feedback=feedback)
    rate = feedback.rate
    assert 0.5 < rate < 2
    feedback.residual = {}
    size = len(encode_update(new, base, feedback=feedback))
    assert size <= sum(t.numel() * t.element_size() for t in base.values()) / 100


def test_few_values_are_coded_by_their_places() -> None:
    base, new = trained()
    dense, sparse = (encode_update(new, base, UpdateSpec(ratio=ratio)) for ratio in (2, 100))
    assert (dense[5], sparse[5]) == (0, 2)
    top = encode_update(new, base, UpdateSpec(ratio=None, selection="top", keep=0.01, rounding="nearest"))
    assert top[5] == 2
    size = sum(t.numel() for n, t in base.items() if n.endswith("weight") or n.endswith("bias"))
    found = decode_update(top, base)
    sent = sum(int((found[n] != base[n]).sum()) for n in base if n.endswith("weight") or n.endswith("bias"))
    assert 0.005 * size < sent <= 0.01 * size + 1


def filled(shapes: list[list[int]], share: float, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    size = sum(int(np.prod(shape)) for shape in shapes)
    places = np.flatnonzero(rng.random(size) < share)
    return places, rng.geometric(0.6, places.size) * rng.choice([-1, 1], places.size), size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.integers(0, 2**31),
)
def test_places_and_values_return(shapes: list[list[int]], share: float, seed: int) -> None:
    grid = grid_of(tuple(tuple(shape) for shape in shapes))
    places, codes, _ = filled(shapes, share, seed)
    if codes.size:
        codes[0] = 32767  # far outside every table
    cursor = Cursor(write_sparse(grid, places, codes), "a test")
    found = read_sparse(cursor, grid)
    cursor.end()
    order = np.argsort(found[0])  # they come by density
    assert np.array_equal(found[0][order], places)
    assert np.array_equal(found[1][order], codes)


def test_rows_and_columns_that_differ_make_fewer_bytes() -> None:
    grid, rng = grid_of(((200, 300),)), np.random.default_rng(0)
    alike = np.flatnonzero(rng.random(60000) < 0.02)
    rows, columns = rng.permutation(200)[:40], rng.permutation(300)[:60]
    cells = (rows[:, None] * 300 + columns[None, :]).reshape(-1)
    uneven = np.sort(rng.permutation(cells)[: alike.size])
    sizes = [len(write_sparse(grid, places, np.ones(places.size, np.int64))) for places in (alike, uneven)]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_groups_of_all_cells_hold_every_cell_once() -> None:
    shapes = ((4, 6), (5,), (), (3, 2, 2, 2))
    grid = grid_of(shapes)
    places, _, size = filled([list(shape) for shape in shapes], 0.2, 3)
    classes = classify(grid, places)
    sizes = classes.group_sizes(grid)
    assert np.array_equal(np.bincount(classes.groups(grid, slice(None)), minlength=sizes.size), sizes)
    assert set(classes.groups(grid, places)) <= set(live(sizes))
    assert int(sizes.sum()) == size


@pytest.mark.parametrize("ratio", [1, 13, 32, 63])
def test_a_geometric_table_is_one_of_rans(ratio: int) -> None:
    table = geometric(ratio)
    assert int(table.sum()) == 4096
    assert int(table.max()) < 4096
    assert table[255] > 0
    assert bool((np.diff(table[:255]) <= 0).all())


def test_momentum_moves_weights_and_takes_all_else_from_the_mean() -> None:
    momentum, held = Momentum(0.5), state(0)
    first, second = near(held, 1), near(held, 2)
    one = momentum.step(held, first)
    assert torch.allclose(one["conv.weight"], first["conv.weight"])
    two = momentum.step(one, second)
    speed = 0.5 * (first["conv.weight"] - held["conv.weight"]) + second["conv.weight"] - one["conv.weight"]
    assert torch.allclose(two["conv.weight"], one["conv.weight"] + speed, atol=1e-6)
    assert torch.equal(two["bn.running_var"], second["bn.running_var"])
    with pytest.raises(InputError, match="momentum"):
        Momentum(1.0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_sparse_bytes_are_refused_or_make_a_state_of_the_base_shape(data: st.DataObject) -> None:
    base = state(0)
    message = bytearray(encode_update(near(base, 1), base, TOP))
    assert message[5] == 2
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(22, len(message) - 5))] = data.draw(st.integers(0, 255))
    assert_refused_or_whole(message, base)
