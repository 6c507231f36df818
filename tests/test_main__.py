import subprocess
import sys

from fastrlhf.cli import USAGE


def test_the_package_is_the_command():
    run = subprocess.run([sys.executable, "-m", "fastrlhf", "--help"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == USAGE
