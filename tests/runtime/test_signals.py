"""Tests of signals to a run. The first signal stops the run at the next safe point. Further signals within five seconds
count as the same request; a later signal ends the run at once.
"""

import pickle
import signal
import threading

import pytest

from fastrlhf.runtime import signals
from fastrlhf.runtime.signals import Interrupted, Interrupts


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 143),
        (signal.SIGUSR1, 143),
        (signal.SIGUSR2, 143),
    ],
)
def test_the_first_signal_waits_and_one_after_the_time_of_repeats_ends_at_once(number, exit_code, clock, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"^interrupted in the middle of a step$") as stop, Interrupts() as interrupts:  # noqa: PT012
        assert interrupts.pending is None
        signal.raise_signal(number)
        assert interrupts.pending == exit_code - 128
        assert "saving, then stopping; a second signal after 5 s stops at once" in capfd.readouterr().err
        clock[0] += 5.001
        signal.raise_signal(number)
        pytest.fail("the later signal was ignored")
    assert stop.value.exit_code == exit_code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", signals.HANDLED)
def test_repeats_within_five_seconds_count_as_one_request(second, clock, capfd):
    """SLURM signals the ranks and the launcher, and the launcher forwards the signal, so every rank gets it twice."""
    with pytest.raises(ZeroDivisionError), Interrupts() as interrupts:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        for seconds in (0.001, 2.0, 2.9):
            clock[0] += seconds
            signal.raise_signal(second)
        assert interrupts.pending == signal.SIGTERM
        _ = 1 / 0
    assert capfd.readouterr().err.count("saving, then stopping") == 1


def test_the_first_signal_ends_the_work_at_once_if_allowed(clock):
    allowed = [False]
    with pytest.raises(Interrupted) as stop, Interrupts(lambda: allowed[0]) as interrupts:  # noqa: PT012
        allowed[0] = True
        signal.raise_signal(signal.SIGUSR1)
        pytest.fail("the signal was ignored")
    assert (stop.value.when, stop.value.exit_code, interrupts.pending) == ("", 143, signal.SIGTERM)
    with Interrupts(lambda: True) as interrupts:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        interrupts.pending = None


@pytest.mark.parametrize("number", signals.HANDLED)
def test_work_with_nothing_to_save_is_stopped_by_the_first_signal(number, capfd, monkeypatch):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"^interrupted$") as stop, signals.stop_at_once():
        signal.raise_signal(number)
    assert stop.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert capfd.readouterr().err == "\nstopping\n"
    assert signal.getsignal(number) is before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with signals.stop_at_once():
        assert signal.getsignal(number) is before


def test_the_request_can_be_sent_to_other_processes():
    stop = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "after step 3", finished=True)))
    assert (str(stop), stop.exit_code, stop.finished) == ("interrupted after step 3", 143, True)


def test_a_signal_that_nothing_handled_is_delivered_at_the_end():
    reached = []
    with pytest.raises(KeyboardInterrupt) as stop, Interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached
    assert not isinstance(stop.value, Interrupted)


def test_an_error_after_a_signal_stays_that_error():
    with pytest.raises(ZeroDivisionError), Interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        _ = 1 / 0


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert interrupts.pending is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_not_handled():
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere():
        with Interrupts() as interrupts:
            seen.append((interrupts.pending, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
