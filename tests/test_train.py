"""Laws of the training loop: equal to a hand-written loop, deterministic, and the same after kill -9."""

import copy
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kompakt.build.checkpoint import FILE
from kompakt.build.optimize import learning_rate_at, make_optimizer
from kompakt.build.settings import Hooks, Loader, TrainSettings, data_seed, shuffled
from kompakt.build.train import evaluate, reestimate_bn, train
from kompakt.errors import FormatError, InputError, MissingExtraError, ModelError
from tests.train_toy import CLASSES, SAMPLES, toy_data, toy_loader, toy_net, toy_settings

PLAIN = TrainSettings(epochs=3, learning_rate=0.05)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


def trained(settings: TrainSettings, *, seed: int = 0, hooks: Hooks = Hooks(), **kwargs) -> nn.Module:
    model = toy_net(seed)
    train(model, toy_loader(), settings, hooks=hooks, **kwargs)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_equals_a_hand_written_loop():
    model, other = toy_net(dropout=0), toy_net(dropout=0)
    settings = TrainSettings(epochs=2, learning_rate=0.05, label_smoothing=0.1, clip_norm=1.0, weight_decay=1e-2)
    report = train(model, toy_loader(), settings)
    kernels = [p for p in other.parameters() if p.ndim > 1]
    rest = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    losses, step = [], 0
    for epoch in range(2):
        torch.manual_seed(data_seed(0, epoch))
        for inputs, labels in toy_loader().batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * step / 12)) / 2
            optimizer.zero_grad()
            loss = F.cross_entropy(other(inputs), labels, label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
    assert torch.allclose(weights(model), weights(other), atol=1e-6)
    assert report.history[0].loss == pytest.approx(sum(losses[:6]) / 6, rel=1e-5)
    assert report.steps == 12


def test_learns():
    model = toy_net()
    before = evaluate(model, toy_loader().batches(0)).accuracy
    report = train(model, toy_loader(), replace(PLAIN, epochs=10))
    assert report.history[-1].loss < 0.5 * report.history[0].loss
    assert evaluate(model, toy_loader().batches(0)).accuracy > max(before, 0.9)
    assert report.history[-1].accuracy > report.history[0].accuracy


@pytest.mark.parametrize("changes", [{"optimizer": "adamw", "learning_rate": 1e-2}, {"schedule": "onecycle"}])
def test_other_optimizers_and_schedules_learn(changes):
    report = train(toy_net(), toy_loader(), replace(PLAIN, epochs=6, **changes))
    assert report.history[-1].loss < 0.7 * report.history[0].loss


def test_same_seed_same_weights_another_seed_others():
    first, second, other = trained(PLAIN), trained(PLAIN), trained(replace(PLAIN, seed=1))
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_the_callers_random_state_modes_and_layout_are_left_alone():
    model = toy_net().eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    train(model, toy_loader(), replace(PLAIN, epochs=1, channels_last=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert all(p.is_contiguous() and p.grad is None for p in model.parameters())


def test_channels_last_and_bf16_train_alike():
    plain = trained(PLAIN)
    assert torch.allclose(weights(plain), weights(trained(replace(PLAIN, channels_last=True))), atol=1e-3)
    rounded = trained(replace(PLAIN, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert 0 < (weights(plain) - weights(rounded)).abs().mean() < 0.1


def test_killed_and_resumed_gives_the_same_weights(tmp_path):
    """A process that is killed at a random step, with a checkpoint every step, goes on here."""
    steps, folder = random.Random(7).randrange(3, 20), tmp_path / "run"
    command = [sys.executable, str(Path(__file__).with_name("train_toy.py")), "killed", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= steps:
                process.kill()
                break
    assert process.returncode == -9
    model = toy_net()
    report = train(model, toy_loader(), toy_settings(folder))
    whole = toy_net()
    undisturbed = train(whole, toy_loader(), toy_settings())
    assert steps - 1 <= report.resumed_at < 24
    assert torch.equal(weights(model), weights(whole))
    assert [r.loss for r in report.history] == [r.loss for r in undisturbed.history]


@pytest.mark.parametrize(("every", "stops"), [(1, range(1, 13)), (4, (3, 6, 11)), (0, (5, 9))])
def test_stopped_at_any_step_and_resumed_gives_the_same_weights(tmp_path, every, stops):
    whole = trained(toy_settings(epochs=2))
    for stop in stops:

        def interrupt(_model, step, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        settings = toy_settings(tmp_path / str(stop), epochs=2, checkpoint_every=every)
        with pytest.raises(KeyboardInterrupt):
            trained(settings, hooks=Hooks(after_step=(interrupt,)))
        assert torch.equal(weights(trained(settings)), weights(whole)), stop


def test_a_finished_run_is_not_run_again(tmp_path):
    settings = toy_settings(tmp_path, epochs=1)
    first = trained(settings)
    model = toy_net()
    report = train(model, toy_loader(), settings)
    assert report.resumed_at == report.steps == 6
    assert torch.equal(weights(model), weights(first))


def poisoned(at: int) -> Loader:
    def batches(epoch: int):
        for step, (inputs, labels) in enumerate(toy_loader().batches(epoch)):
            yield inputs * (math.nan if 6 * epoch + step == at else 1), labels

    return Loader(batches=batches, steps=6)


def test_a_nan_loss_stops_and_the_last_good_checkpoint_stays(tmp_path):
    settings = toy_settings(tmp_path, epochs=3)
    with pytest.raises(ModelError, match=r"step 8 \(epoch 1\): the loss is nan \(task nan\); lower the learning rate"):
        train(toy_net(), poisoned(8), settings)
    model = toy_net()
    report = train(model, toy_loader(), settings)
    assert report.resumed_at == 8
    assert torch.isfinite(weights(model)).all()


def test_a_nan_regularizer_is_named():
    with pytest.raises(ModelError, match=r"task \d.*regularizer nan"):
        trained(PLAIN, regularizers=(lambda model: model[0].weight.sum() * math.nan,))


def test_a_weight_that_is_not_finite_is_never_checkpointed(tmp_path):
    def spoil(model, step):
        if step == 5:
            model[3].weight.data[0, 0, 0, 0] = math.inf

    settings = toy_settings(tmp_path)
    with pytest.raises(ModelError, match=r"step 5: model\.3\.weight is no longer finite"):
        trained(settings, hooks=Hooks(after_step=(spoil,)))
    assert torch.isfinite(weights(trained(settings))).all()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trained(toy_settings(tmp_path, epochs=1))
    with pytest.raises(InputError, match=r"belongs to another run \(learning_rate was 0.05, is 0.01\)"):
        trained(toy_settings(tmp_path, epochs=1, learning_rate=0.01))
    with pytest.raises(InputError, match="of another model"):
        train(toy_net(width=4), toy_loader(), toy_settings(tmp_path, epochs=1))


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda _raw: b"", lambda _raw: b"cos\nsystem\n(S'x'\ntR."]
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    settings = toy_settings(tmp_path, epochs=1)
    trained(settings)
    path = tmp_path / FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match="not a readable checkpoint"):
        trained(settings)


def rates(steps=100, **changes) -> list[float]:
    settings = TrainSettings(**{"epochs": 10, "learning_rate": 1.0, **changes})
    return [learning_rate_at(settings, step, steps) for step in range(steps)]


def test_schedules():
    cosine = rates()
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[99] < 1e-3
    assert cosine == sorted(cosine, reverse=True)
    warm = rates(warmup_epochs=2)
    assert warm[:20] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert max(warm) == warm[20] == 1.0
    twice = rates(cycles=2, warmup_epochs=2)
    assert twice[:50] == twice[50:] == rates(epochs=5, warmup_epochs=2, steps=50)
    cycle = rates(schedule="onecycle")
    assert cycle[0] == pytest.approx(0.04)
    assert cycle.index(max(cycle)) == 30
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)
    assert set(rates(schedule="constant")) == {1.0}


def test_norms_and_biases_are_not_decayed_unless_asked():
    model = toy_net()
    kernels, rest = make_optimizer(model, PLAIN).param_groups
    assert {p.ndim for p in kernels["params"]} == {2, 4}
    assert {p.ndim for p in rest["params"]} == {1}
    assert (kernels["weight_decay"], rest["weight_decay"]) == (5e-4, 0.0)
    (group,) = make_optimizer(model, replace(PLAIN, decay_all=True)).param_groups
    assert len(group["params"]) == len(list(model.parameters()))


def test_a_regularizer_shrinks_what_it_weighs():
    def l1(model):
        return 0.05 * model[0].weight.abs().sum()

    assert trained(PLAIN, regularizers=(l1,))[0].weight.abs().sum() < 0.5 * trained(PLAIN)[0].weight.abs().sum()


def test_after_step_holds_a_mask_from_the_start_to_the_end():
    mask = (torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    seen = []

    def hold(model, step):
        model[0].weight.data.mul_(mask)
        seen.append(step)

    model = trained(replace(PLAIN, epochs=1), hooks=Hooks(after_step=(hold,)))
    assert torch.equal(model[0].weight == 0, mask == 0)
    assert seen == list(range(7))


def test_the_average_is_a_mean_of_the_weights_on_the_way():
    path = []
    record = Hooks(after_step=(lambda model, _step: path.append(weights(model)),))
    model = trained(replace(PLAIN, epochs=1, ema=0.9), hooks=record)
    average = path[0]
    for step, value in enumerate(path[1:], start=1):
        average = average.lerp(value, 1 - min(0.9, (1 + step) / (10 + step)))
    counters = torch.cat([torch.full((v.numel(),), not v.is_floating_point()) for v in model.state_dict().values()])
    assert torch.allclose(weights(model)[~counters], average[~counters], atol=1e-5)


def test_frozen_batch_norms_keep_their_statistics():
    model = toy_net()
    model[1].running_mean.fill_(0.3)
    train(model, toy_loader(), replace(PLAIN, epochs=1, freeze_bn=True))
    assert torch.equal(model[1].running_mean, torch.full((8,), 0.3))


def test_validation_runs_in_inference_mode_and_is_recorded():
    modes = []

    def validate(model):
        modes.append(model.training)
        return evaluate(model, toy_loader().batches(0)).accuracy

    records = []
    report = train(toy_net(), toy_loader(), PLAIN, hooks=Hooks(validate=validate, log=records.append))
    assert modes == [False] * 3
    assert report.history == tuple(records)
    assert 0 < report.history[-1].validation <= 1


def test_another_task_than_classification():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    hooks = Hooks(task_loss=lambda outputs, labels: F.mse_loss(outputs[:, 0], labels.float()))
    report = train(model, toy_loader(), replace(PLAIN, learning_rate=1e-3), hooks=hooks)
    assert report.history[-1].loss < report.history[0].loss


def test_a_captured_graph_without_modes_trains():
    graph = torch.export.export(toy_net(dropout=0).eval(), (torch.zeros(16, 3, 6, 6),)).module()
    report = train(graph, toy_loader(), PLAIN)
    assert report.history[-1].loss < report.history[0].loss


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="label 3 in the data, but the model has 2 classes"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), toy_loader(), PLAIN)
    with pytest.raises(InputError, match="gave 6 batches, 9 were announced"):
        train(toy_net(), replace(toy_loader(), steps=9), PLAIN)
    with pytest.raises(InputError, match="nothing to train"):
        train(toy_net().requires_grad_(False), toy_loader(), PLAIN)
    with pytest.raises(InputError, match="no batch"):
        replace(toy_loader(), steps=0)
    with pytest.raises(InputError, match="no batch"):
        train(toy_net(), Loader(batches=lambda epoch: (), steps=1), PLAIN)
    with pytest.raises(InputError, match="there is one process"):
        train(toy_net(), toy_loader(), replace(PLAIN, shard=True))
    with pytest.raises(InputError, match="none where parameters are sharded"):
        replace(PLAIN, shard=True, ema=0.9)
    for changes in (
        {"epochs": 0},
        {"learning_rate": -1},
        {"schedule": "step"},
        {"ema": 1.0},
        {"warmup_epochs": 3},
        {"cycles": 4},
    ):
        with pytest.raises(InputError, match=f"{next(iter(changes))} .*: expected"):
            replace(PLAIN, **changes)


def test_tensorboard_writes_events_or_names_what_to_install(tmp_path):
    hooks = Hooks(tensorboard=tmp_path)
    if find_spec("tensorboard") is None:
        with pytest.raises(MissingExtraError, match="pip install tensorboard"):
            trained(PLAIN, hooks=hooks)
    else:
        trained(PLAIN, hooks=hooks)
        assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_shuffled_visits_everything_once_in_an_order_of_its_own():
    class Split:
        def __len__(self):
            return SAMPLES

        def batches(self, batch_size, *, shuffle, generator, augment):
            assert shuffle
            assert augment is None
            for index in torch.randperm(SAMPLES, generator=generator).split(batch_size):
                yield index, index

    loader = shuffled(Split(), 10, seed=3)
    epochs = [torch.cat([x for x, _ in loader.batches(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert loader.steps == 10
    assert sorted(epochs[0]) == list(range(SAMPLES))
    assert epochs[0] == epochs[2] != epochs[1]


def test_reestimated_batch_norms_see_what_the_data_give():
    images, _ = toy_data()
    model = toy_net().eval()
    model[1].running_mean.fill_(9)
    before = copy.deepcopy(model)
    reestimate_bn(model, ((x, None) for x in images.split(32)))
    seen = before[0](images).transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean, seen.mean(dim=1), atol=1e-6)
    assert torch.allclose(model[1].running_var, seen.var(dim=1), rtol=0.05)
    assert model[1].momentum == 0.1
    assert not model[1].training
    assert torch.equal(model[0].weight, before[0].weight)
    with pytest.raises(InputError, match="no batch"):
        reestimate_bn(model, ())


def test_evaluate_counts_right_answers():
    model = nn.Sequential(nn.Dropout(0.9), nn.Flatten())
    inputs = torch.eye(CLASSES)
    result = evaluate(model, [(inputs, torch.tensor([0, 1, 2, 0]))])
    assert result.correct.tolist() == [True, True, True, False]
    assert result.accuracy == 0.75
    assert model.training
    with pytest.raises(InputError, match="no batch"):
        evaluate(model, [])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: TorchInductor needs one")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
def test_a_compiled_step_trains_alike():
    plain, compiled = toy_net(dropout=0), toy_net(dropout=0)
    train(plain, toy_loader(), replace(PLAIN, epochs=1))
    train(compiled, toy_loader(), replace(PLAIN, epochs=1, compile=True))
    assert torch.allclose(weights(plain), weights(compiled), atol=1e-4)
