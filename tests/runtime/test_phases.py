"""Where the time of a start of a run goes."""

import gc
import weakref

import pytest

from glmd.runtime import phases
from glmd.runtime.phases import known_objects_set_aside, phase


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """`clock[0] += 3` lets three seconds pass."""
    now = [100.0]
    monkeypatch.setattr("glmd.runtime.phases.time.monotonic", lambda: now[0])
    phases.forget()
    yield now
    phases.forget()


def test_a_phase_within_another_counts_for_itself_alone_and_all_add_up(clock):
    @phase("scoring")
    def score():
        clock[0] += 5

    with phase("rest"):
        clock[0] += 1
        with phase("training"):
            clock[0] += 10
            score()
            clock[0] += 20
            with phase("training"):
                clock[0] += 0.5
        clock[0] += 2
        assert phases.seconds() == {"training": 30.5, "scoring": 5.0, "rest": 3.0}
    clock[0] += 1000  # outside of all
    assert list(phases.seconds().items()) == [("training", 30.5), ("scoring", 5.0), ("rest", 3.0)]
    phases.forget()
    assert phases.seconds() == {}


def test_a_phase_that_is_refused_has_ended(clock):
    @phase("checks")
    def refuse():
        clock[0] += 2
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"), phase("rest"):
        refuse()
    clock[0] += 7
    with phase("rest"):
        clock[0] += 1
    assert phases.seconds() == {"checks": 2.0, "rest": 1.0}


def test_what_a_command_imports_is_set_aside_until_a_run_has_ended(clock):
    with phases.imports():
        assert not gc.isenabled()
        clock[0] += 4
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    with known_objects_set_aside():
        pass
    assert gc.get_freeze_count() == 0 and phases.seconds() == {"imports": 4.0}


def test_garbage_of_a_run_is_found_and_what_was_there_before_is_found_after_it():
    class Model:
        def __init__(self):
            self.itself = self

    before = Model()
    old = weakref.ref(before)
    with known_objects_set_aside():
        new = weakref.ref(Model())
        del before
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None and gc.get_freeze_count() == 0
