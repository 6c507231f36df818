import os
import signal

import pytest

from fastrlhf.data.parallel import in_order


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order(processes):
    offset = [100]  # inherited by the processes
    found = list(in_order(lambda i: (offset[0] + i, os.getpid()), 8, processes))
    assert [value for value, _ in found] == list(range(100, 108))
    assert len({pid for _, pid in found} | {os.getpid()}) == (1 if processes == 1 else 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_exception_is_raised_in_its_place(processes):
    def fails(i: int) -> int:
        if i == 3:
            raise ValueError(f"row {i} is bad")
        return i

    results = in_order(fails, 6, processes)
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3 is bad"):
        next(results)


def test_a_dead_process_is_an_error_and_an_unfinished_iteration_ends_the_processes():
    def dies(i: int) -> int:
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    with pytest.raises(RuntimeError, match=r"has died with exit code -9.*set dataset_num_proc to 1"):
        list(in_order(dies, 6, 2))
    results = in_order(dies, 2, 2)
    pid = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
