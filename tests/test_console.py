import os
import subprocess
import sys

import pytest

SCRIPT = """
import logging
from fastrlhf.console import quiet_libraries
quiet_libraries()
print("printed")
logging.getLogger("fastrlhf.optim").info("told")
logging.getLogger("fastrlhf.optim").error("failed")
logging.getLogger("datasets").info("advice")
"""


@pytest.mark.parametrize(("rank", "printed", "logged"), [("0", "printed\n", "told\nfailed\n"), ("1", "", "failed\n")])
def test_the_first_process_speaks_and_errors_of_all_show(rank, printed, logged):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "RANK": rank}, capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == (printed, logged)
