import os
import signal
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a library that reads it: no test reaches for the hub
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, one program after another
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all it starts, would ignore it


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of kernels, memory that nobody has written is NaN, and an op whose result may vary is an error."""
    if request.path.parent.name != "kernels":
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
