import threading

import pytest

from fastrlhf.runtime.ahead import Ahead


def test_each_batch_is_made_once_in_another_thread_while_the_step_before_runs():
    made, begun = [], [threading.Event() for _ in range(4)]

    def make(batch: int) -> int:
        made.append((batch, threading.current_thread() is threading.main_thread()))
        begun[batch].set()
        return batch * 10

    with Ahead(range(4), make) as ahead:
        for step in range(4):
            assert ahead.take(step) == step * 10
            if step < 3:  # the next batch is made before it is requested
                assert begun[step + 1].wait(10)
    assert made == [(0, False), (1, False), (2, False), (3, False)]


def test_a_resumed_run_makes_nothing_for_the_steps_before():
    made = []
    with Ahead(range(9), lambda batch: made.append(batch) or batch) as ahead:
        assert [ahead.take(step) for step in (6, 7, 8)] == [6, 7, 8]
    assert made == [6, 7, 8]


def test_a_step_gets_its_own_batch_after_steps_that_were_left_out():
    with Ahead(range(9), lambda batch: batch) as ahead:
        assert [ahead.take(step) for step in (0, 3, 4)] == [0, 3, 4]


def test_an_exception_is_raised_in_the_step_that_needs_the_result():
    def make(batch: int) -> int:
        if batch == 2:
            raise ValueError("row 7 is bad")
        return batch

    with Ahead(range(4), make) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        with pytest.raises(ValueError, match="row 7 is bad"):
            ahead.take(2)
