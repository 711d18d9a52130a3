"""
Scenarios of faults, how often each is tried, and what each try may end in.

A scenario is a function that harms something and looks at what the package makes of it. It returns an [`Ending`]. An
exception that it does not expect, a failed assertion and a try that takes too long count as *lost*: something was
wrong without a word, or was said in another way than by one named error.
"""

import contextlib
import inspect
import logging
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


SHOWN_FAILURES = 3  # of a scenario, in full


class Ending(StrEnum):
    """What a try ended in."""

    INTACT = "intact"  # the result is the one without a fault
    RECOVERED = "recovered"  # it is that of an earlier whole state, or was computed anew
    REFUSED = "refused"  # one named error


class TooLong(BaseException):
    """A try took longer than its scenario allows. Not an `Exception`, so that no code under test takes it for one."""


@dataclass
class Trial:
    """
    One try.

    Args:
        name (`str`): Of the scenario.
        seed (`int`): Of the run.
        number (`int`): Of the try, from 0.
        folder (`pathlib.Path`): Empty, and removed after the try.
    """

    name: str
    seed: int
    number: int
    folder: Path
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(f"{self.name}:{self.seed}:{self.number}")


@dataclass(frozen=True)
class Scenario:
    """
    Args:
        name (`str`): What is wrong, for the table.
        area (`str`): What it happens to.
        tries (`int`): In a full run.
        short (`int`): In the run of `make test`; 0 leaves the scenario out of it.
        seconds (`float`): That one try may take.
        attempts (`Callable`): From the number of tries and the seed, yields functions without arguments, one a try.
    """

    name: str
    area: str
    tries: int
    short: int
    seconds: float
    attempts: Callable[[int, int], Iterator[Callable[[], Ending]]]


@dataclass
class Result:
    """How the tries of a scenario ended."""

    name: str
    area: str
    tries: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.tries - sum(self.endings.values())

    def row(self) -> dict[str, Any]:
        """For the table and the JSON file."""
        counts = {ending.value: self.endings[ending.value] for ending in Ending}
        facts = {"area": self.area, "fault": self.name, "tries": self.tries, "lost": self.lost, **counts}
        return {**facts, "seconds": round(self.seconds, 1), "failures": self.failures[:SHOWN_FAILURES]}


SCENARIOS: list[Scenario] = []


def scenario(
    name: str, *, area: str, tries: int, short: int, seconds: float = 30.0
) -> Callable[[Callable[[Trial], Ending]], Callable[[Trial], Ending]]:
    """Registers a function of a [`Trial`] as a scenario; arguments are those of [`Scenario`]."""

    def register(function: Callable[[Trial], Ending]) -> Callable[[Trial], Ending]:
        def attempts(count: int, run_seed: int) -> Iterator[Callable[[], Ending]]:
            for number in range(count):
                yield lambda number=number: _in_folder(function, name, run_seed, number)

        SCENARIOS.append(Scenario(name, area, tries, short, seconds, attempts))
        return function

    return register


def fuzzed(
    name: str, strategy: SearchStrategy[Any], *, area: str, tries: int, short: int, seconds: float = 10.0
) -> Callable[[Callable[[Any, Trial], Ending]], Callable[[Any, Trial], Ending]]:
    """Registers a function of a value that hypothesis makes, and of a [`Trial`], as a scenario."""

    def register(function: Callable[[Any, Trial], Ending]) -> Callable[[Any, Trial], Ending]:
        def attempts(count: int, run_seed: int) -> Iterator[Callable[[], Ending]]:
            values = _examples(strategy, count, run_seed)
            for number, value in enumerate(values):
                yield lambda value=value, number=number: _in_folder(
                    lambda trial: function(value, trial), name, run_seed, number, given=value
                )

        SCENARIOS.append(Scenario(name, area, tries, short, seconds, attempts))
        return function

    return register


def _examples(strategy: SearchStrategy[Any], count: int, run_seed: int) -> list[Any]:
    values: list[Any] = []

    @seed(run_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        values.append(value)

    collect()
    return values[:count]


def _in_folder(
    function: Callable[[Trial], Ending], name: str, run_seed: int, number: int, given: Any = inspect.Parameter.empty
) -> Ending:
    folder = Path(tempfile.mkdtemp(prefix="trl_gopd_fault_"))
    try:
        return function(Trial(name, run_seed, number, folder))
    except BaseException as error:
        if given is not inspect.Parameter.empty:
            error.add_note(f"The value was {str(given)[:2000]!r}.")
        error.add_note(f"This was try {number} of {name!r} with the seed {run_seed}.")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(scenario: Scenario, *, tries: int, seed: int) -> Result:
    """Makes the tries of a scenario, one after the other, in the main thread."""
    result = Result(scenario.name, scenario.area)
    start = time.perf_counter()
    with quiet():
        for attempt in scenario.attempts(tries, seed):
            result.tries += 1
            try:
                with time_limit(scenario.seconds):
                    ending = attempt()
                assert isinstance(ending, Ending), f"A try has to return an `Ending`, got {ending!r}."
                result.endings[ending.value] += 1
            except KeyboardInterrupt:
                raise
            except BaseException:  # `SystemExit` and `TooLong` among them
                result.failures.append(traceback.format_exc())
    result.seconds = time.perf_counter() - start
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing but errors in the body, and what the body sets for loggers is undone."""
    from transformers.utils import logging as of_transformers

    own = logging.getLogger("trl_gopd")
    level, verbosity, has_bars = own.level, of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        own.setLevel(level)
        of_transformers.set_verbosity(verbosity)
        if has_bars:
            of_transformers.enable_progress_bar()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises [`TooLong`] in the body after so many seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong(f"It took longer than {seconds} seconds.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
