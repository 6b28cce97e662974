"""Prints what these installed distributions require here, a line each: `make vllm-env` installs it.

vLLM's processor build names packages for pictures and sound, which text does not need and which drag in another torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})


def main(names: list[str]) -> None:
    print("torch")  # it is there; its own requirements may not be
    for line in (line for name in names for line in requires(name) or ()):
        found = Requirement(line)
        if found.name not in LEFT_OUT and (found.marker is None or found.marker.evaluate({"extra": ""})):
            found.marker = None
            print(found)


main(sys.argv[1:])
