"""Signals: the first waits, the second does not."""

import signal
import threading

import pytest

from fastrlhf.runtime.signals import Interrupted, Interrupts


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_and_the_second_ends_at_once(number, exit_code, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"^interrupted in the middle of a step$") as stop, Interrupts() as interrupts:  # noqa: PT012
        assert interrupts.pending is None
        signal.raise_signal(number)
        assert interrupts.pending == number
        assert "finishing this step, then saving; once more ends at once" in capfd.readouterr().err
        signal.raise_signal(number)
        pytest.fail("the second signal was not heard")
    assert stop.value.exit_code == exit_code
    assert signal.getsignal(number) is before


def test_a_signal_that_nobody_obeyed_is_delivered_at_the_end():
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
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert interrupts.pending is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere():
        with Interrupts() as interrupts:
            seen.append((interrupts.pending, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
