"""The study on disk: Optuna's record of who tried what, shared by all workers of one search."""

import fcntl
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from kompakt.engine.choice import Choice
from kompakt.engine.strategy import MOST_EPOCHS, Space
from kompakt.errors import InputError
from kompakt.files import atomic_write
from kompakt.measure.result import Tried

NAME = "kompakt"
JOURNAL = "study.journal"
MARK = "study.id"
GRACE_SECONDS = 10
DRAWN, AFTER = ("fewer_macs", "drop_blocks", "rate", "epochs"), "after"
"""What Optuna knows of a choice, and where a trial says the number of the one that it goes on from."""
STARTUP = 6
"""Candidates that the sampler draws blindly before it trusts what it saw."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A study, and the folder of the locks that tell which worker is alive.

    Args:
        study: Optuna's.
        locks: the folder.
        seed: of the sampler.
    """

    study: optuna.Study
    locks: Path
    seed: int

    def drops(self, judged: dict[int, float]) -> dict[Choice, float]:
        """Return the points that every candidate lost; infinite where it failed or is in another worker's hands."""
        found: dict[Choice, float] = {}
        for number, choice in self.choices().items():
            found[choice] = min(judged.get(number, float("inf")), found.get(choice, float("inf")))
        return found

    def choices(self) -> dict[int, Choice]:
        """Return what every trial tries, but for those whose worker died before it was written down."""
        found: dict[int, Choice] = {}
        for trial in self.study.get_trials(deepcopy=False):
            choice = choice_of(trial, found)
            if choice is not None:
                found[trial.number] = choice
        return found

    @contextmanager
    def alone(self, doing: str = "taking") -> Iterator[None]:
        """Let no other worker of this folder do the same: two would take one trial, or mix the files that ship."""
        with (self.locks / f"{doing}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def taken(
        self, proposed: Choice | None, space: Space, reach: Space | None = None
    ) -> Iterator[tuple[Trial, Choice]]:
        """Take a trial that a dead worker left, else a new one: what is proposed, or what the sampler draws.

        Where there are other workers, enter it under ``alone``.

        Args:
            proposed: by the plan of the search; None lets the sampler draw.
            space: what may be tried.
            reach: what the sampler may draw; None is ``space``.
        """
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with self._held(trial.number) as alone:
                if alone and self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
                    mine = Trial(self.study, trial._trial_id)
                    yield mine, self._read(mine, space, reach)
                    return
        self.study.sampler = _sampler(self.seed + len(self.study.get_trials(deepcopy=False)))
        if proposed is not None:
            numbers = {choice: number for number, choice in self.choices().items()}
            after = {} if proposed.after is None else {AFTER: numbers[proposed.after]}
            self.study.enqueue_trial({name: getattr(proposed, name) for name in DRAWN}, user_attrs=after)
        mine = self.study.ask()
        with self._held(mine.number):
            yield mine, self._read(mine, space, reach)

    def in_hand(self) -> int:
        """Count the trials that other workers, alive, are at; enter it under ``alone``."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return sum(self._elsewhere(trial.number) for trial in running)

    def _elsewhere(self, number: int) -> bool:
        with self._held(number) as mine:
            return not mine

    def _read(self, trial: Trial, space: Space, reach: Space | None) -> Choice:
        """Read what a trial tries: what was proposed, or what the sampler draws."""
        planned = self._planned(trial)
        drawn = _suggest(trial, space if planned else reach or space, planned)
        after = trial.user_attrs.get(AFTER)
        return drawn if after is None else replace(drawn, after=self.choices()[after])

    def _planned(self, trial: Trial) -> bool:
        """Whether a trial was proposed, not left to the sampler."""
        return "fixed_params" in self.study.get_trials(deepcopy=False)[trial.number].system_attrs

    @contextmanager
    def _held(self, number: int) -> Iterator[bool]:
        """Hold the lock of a trial while a worker is at it; the system lets go of it when the worker dies."""
        with (self.locks / f"{number:03d}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def tell(self, trial: Trial, found: Tried) -> None:
        """Write down how a trial ended."""
        if found.state != "verified":
            self.study.tell(trial, state=TrialState.FAIL)
            return
        assert found.points is not None
        assert found.packed_bytes is not None
        assert found.latency_ratio is not None
        self.study.tell(trial, (found.points, float(found.packed_bytes), found.latency_ratio))


def open_ledger(out: Path, url: str | None, identity: dict[str, str], seed: int) -> Ledger:
    """Open or begin the study of a search.

    Args:
        out: the folder of the search; the study is a journal there unless ``url`` names a storage.
        url: as Optuna takes it (``sqlite:///study.db``, ``mysql://…``), or the path of a journal.
        identity: what the study is of; one of another model or other data is refused.
        seed: of the sampler.

    Raises:
        InputError: the storage cannot be reached, or the study is of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = url or str(out / JOURNAL)
    try:
        study = optuna.create_study(
            study_name=NAME, storage=_storage(where), directions=["minimize"] * 3, load_if_exists=True
        )
        known = study.user_attrs.get("identity")
        if known is None:
            known = identity
            study.set_user_attr("identity", identity)
    except InputError:
        raise
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--study {where}: cannot be opened: {line}") from None
    differs = [key for key in identity if known.get(key) != identity[key]]
    if differs:
        told = ", ".join(f"{key} {known.get(key)} there, {identity[key]} here" for key in differs)
        raise InputError(f"{where}: the study is of something else ({told}); take another --out, or delete it")
    locks = out / "locks"
    locks.mkdir(exist_ok=True)
    ledger = Ledger(study=study, locks=locks, seed=seed)
    if url is not None:
        with ledger.alone("opening"):
            _one_folder(study, out, url)
    return ledger


def _one_folder(study: optuna.Study, out: Path, url: str) -> None:
    """Mark the folder of a study that lies elsewhere.

    Raises:
        InputError: the study's candidates lie in another folder.
    """
    mark, known = out / MARK, study.user_attrs.get("folder")
    if known is None:
        known = uuid.uuid4().hex
        atomic_write(mark, known.encode())
        study.set_user_attr("folder", known)
    if not mark.exists() or mark.read_text() != known:
        raise InputError(
            f"--study {url}: its candidates and locks lie in another folder than {out}; all workers share one --out, "
            "on a file system that all of them see"
        )


def choice_of(trial: FrozenTrial, earlier: Mapping[int, Choice]) -> Choice | None:
    """Read what a trial tries; None where its worker died before it was written down.

    Args:
        trial: of the study.
        earlier: what the trials before it try, by number.
    """
    found = trial.params if len(trial.params) == len(DRAWN) else trial.system_attrs.get("fixed_params", {})
    after = trial.user_attrs.get(AFTER)
    before = None if after is None else earlier[after]
    return Choice(**found, after=before) if len(found) == len(DRAWN) else None


def _suggest(trial: Trial, space: Space, planned: bool) -> Choice:
    """Read what a trial tries, or let the sampler draw it: trained as long as any network may be, or not at all."""
    least = space.epochs_at(1.0)
    longest, step = (max(space.epochs, MOST_EPOCHS), 1) if planned else (least, max(least, 1))
    rates = (0.0,) if space.objective == "latency" else (0.0, *sorted({*space.rates, *space.prices}))
    return Choice(
        fewer_macs=round(trial.suggest_float("fewer_macs", 1.0, space.most, step=0.01), 2),
        drop_blocks=trial.suggest_int("drop_blocks", 0, space.blocks),
        rate=trial.suggest_categorical("rate", rates),
        epochs=trial.suggest_int("epochs", 0, longest, step=step),
    )


def _sampler(seed: int) -> optuna.samplers.TPESampler:
    """A sampler without memory of its own: what it draws depends on the study and the seed alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)


def _storage(where: str) -> BaseStorage | str:
    if "://" in where:
        return where
    path = Path(where)
    lock = JournalFileOpenLock(where, grace_period=GRACE_SECONDS)
    lock.acquire()
    try:
        _cut_half_line(path)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(where, lock_obj=lock))


def _cut_half_line(path: Path) -> None:
    """Take off the end of a journal what a worker was writing when it was killed."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
