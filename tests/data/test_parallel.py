import os
import signal
import subprocess
import sys

import pytest

from fastrlhf.data.parallel import default_processes, in_order


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order(processes):
    offset = [100]  # the worker processes inherit this variable
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


FREES = """
import os
from fastrlhf.data.parallel import return_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

return_memory()
before = resident()
blocks = [bytearray(b"x" * 60_000) for _ in range(2000)]  # below the size that glibc maps separately
last = bytearray(60_000)  # keeps the top of the heap in use
del blocks
return_memory()
print(resident() - before)
"""


def test_memory_that_was_freed_goes_back_to_the_system():
    """Measures in a new process, because threads left by other tests would allocate memory."""
    assert int(subprocess.check_output([sys.executable, "-c", FREES])) < 20e6


def test_there_is_a_process_per_core_and_at_least_two(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert [default_processes(), default_processes(4), default_processes(99)] == [12, 3, 2]
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_processes() == 1
