import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # set before libraries read it, so that no test contacts the hub
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fastrlhf-tests-")  # the token store is in this folder
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, one program after another
torch.set_num_threads(1)  # more threads would only slow down such small models
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a process under nohup ignores SIGHUP
# A background job of a shell and its child processes ignore SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills uninitialised memory with NaN and makes non-deterministic ops raise an error, in kernel tests only."""
    if request.path.parent.name != "kernels":
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
