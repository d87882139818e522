"""The files of a run folder: weights, training states, versions."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch


def versions() -> dict[str, str]:
    """Return what a reader needs to repeat a run: versions of the libraries and our commit."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        found = subprocess.run(command, cwd=here, capture_output=True, text=True)
        commit = found.stdout.strip()
    return {
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
