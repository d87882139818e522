"""The files of a run folder: weights with a note of what made them, training states, a lock.

Weights are safetensors and states are read with `weights_only`: loading never runs what a file
contains. Every file is written whole or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from plumbing.files import UserError, lines_of, out_of_memory, write_file
from plumbing.weights import digest

try:
    import fcntl
except ImportError:  # not on Windows: there nothing tells a second process
    fcntl = None


@lru_cache
def versions() -> dict[str, str]:
    """Return what a reader needs to repeat a run: versions of the libraries and our commit.

    The commit is that of the first call: a process runs what it has read by then.
    """
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


# --- weights ------------------------------------------------------------------------------------


def write_weights(path: Path, tensors: Mapping[str, Tensor], note: dict):
    """Write weights with a note in the file's header, and a digest of what they are."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in sorted(tensors.items())}
    total = hashlib.sha256()
    for name, x in tensors.items():
        total.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().data)
    note = {**note, "digest": total.hexdigest()[:16]}
    write_file(path, save(tensors, {"note": json.dumps(note)}))  # one entry: their order is random


def read_note(path: Path) -> dict:
    """Return the note of a weights file; {} if it is damaged or has none.

    Older files have no digest: then it is that of the whole file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
        note = json.loads(header["note"]) if "note" in header else dict(header)
        if "digest" not in note:
            note["digest"] = digest([path])
        return {**note, "steps": int(note.get("steps", 0))}
    except (safetensors.SafetensorError, ValueError, TypeError):
        return {}


def read_weights(path: Path, part: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return a part's tensors as float32, of a file in which they are named "PART.name".

    KeyError that names a tensor which belongs to none of the parts.
    """
    found = {}
    with safetensors.safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            owner, _, rest = name.partition(".")
            if owner not in parts:
                raise KeyError(f"unexpected {name}")
            if owner == part:
                found[rest] = file.get_tensor(name).to(torch.float32, copy=True)
    return found


# --- training states ----------------------------------------------------------------------------


def write_state(path: Path, state: dict):
    """Write a training state; the old one stays until the new one is complete."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def read_state(path: Path) -> dict | None:
    """Return a training state, or None if there is none; UserError if it is something else."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many classes; torch says how to run what is in the file
            misfit(error)
            state = None
    if not isinstance(state, dict) or not state:
        raise UserError(
            f"{path} is not a training state (damaged, or another kind of file): "
            "--fresh starts over"
        )
    return state


def misfit(error: Exception) -> str:
    """Return in a line why what was read does not fit; raise the error where memory was missing."""
    if out_of_memory(error):
        raise error
    return lines_of(error)[-1].strip()  # where torch says what it is about


# --- one process at a time ----------------------------------------------------------------------


class Busy(UserError):
    """Another process is at work in a folder."""


@contextlib.contextmanager
def locked(folder: Path):
    """Keep other processes from training in a folder; a killed process keeps nobody out.

    Busy names the process that is there already.
    """
    path, missing = folder / ".lock", [x for x in (folder, *folder.parents) if not x.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                    raise OSError  # the one before has just ended, and taken this file away
            except OSError:
                file.seek(0)
                other = file.read().decode() or "unknown"
                raise Busy(
                    f"{folder}: process {other} is training there; wait for it, or give another "
                    "--out"
                ) from None
        with contextlib.suppress(OSError):  # a full disk is no reason that nobody may train
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of folders that are still empty nothing is left
                for made in missing:
                    made.rmdir()
