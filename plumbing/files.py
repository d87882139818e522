"""Errors in one line, files written whole or not at all, optional libraries."""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO


class UserError(ValueError):
    """Something the user can put right, in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str, longest: int = 2000) -> str:
    """Return a message without line ends or control characters: a name of a file may hold any."""
    if len(message) > longest:
        message = f"{message[: longest // 2]} ... {message[-longest // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return lines_of(error)[0]


def lines_of(error: Exception) -> list[str]:
    """Return the lines of an error's message, or its class where it has none."""
    return str(error).strip().splitlines() or [type(error).__name__]


def keep_freed_memory(largest: int = 2**25):
    """Let the C library keep what is freed, for what is allocated next (glibc only).

    Else tensors of each step come as new pages, which takes a tenth of a training step on a CPU.
    largest: bytes of a block; some versions take no more than the default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim, top_pad, mmap = -1, -2, -3  # of malloc.h
        mallopt(mmap, largest)
        mallopt(trim, 2**31 - 1)
        mallopt(top_pad, 2**28)


def command(main: Callable[[], None]):
    """Run a command line's main: what the user can put right is one line and exit code 2."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every name of a file has an encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        refuse(str(error))
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        refuse(f"{where}{error.strerror}" if error.strerror else str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = first_line(error)
        refuse(f"out of memory: make the clips, the batch or the model smaller ({said})")
    except KeyboardInterrupt:
        sys.exit(130)


def out_of_memory(error: Exception) -> bool:
    """Return whether memory is what was missing: torch has no class for that of a CPU."""
    missing = re.search("allocate memory|of memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(missing))


def refuse(message: str):
    """Say in one line what was wrong, and leave with exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def naming(path: Path):
    """Let an error of the system say that it is about this file, whichever it was raised for."""
    try:
        yield
    except OSError as error:  # also those of libraries, whose names cannot be changed
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to: whole it becomes `path`, after an error nothing is left of it.

    Until then it has a temporary name in the same folder.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # a name may be long
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what cannot be undone is not what went wrong
            temporary.unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()
        raise


def write_file(path: Path, data: bytes):
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(data)


def update_file(path: Path, data: bytes):
    """Write a file, unless it holds this already."""
    if not path.exists() or path.read_bytes() != data:
        write_file(path, data)


def to_path(path: str) -> Path:
    """Return a path of the command line. An empty one would be the folder one happens to be in."""
    if not path:
        raise argparse.ArgumentTypeError("a path is empty")
    return Path(path)


def check_target(path: Path, folder: bool = False):
    """Raise UserError where a file, or a folder of them, could not be written when all is done."""
    there = next(p for p in (path, *path.parents, Path()) if p.exists())
    if folder and there == path and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder")
    if not folder and path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if there != path and not there.is_dir():
        raise UserError(f"{path} cannot be written: {there} is a file, not a folder")
    where = there if there.is_dir() else there.parent
    if not os.access(where, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {where}")


def read_json(file: Path) -> object:
    """Return what a JSON file holds; UserError if it is none, FileNotFoundError if not there."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file} is not a file")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable as JSON: {first_line(error)}") from None


def sweep(folder: Path):
    """Remove what writers that were killed have left in a folder; not what one is writing now."""
    for temporary in folder.glob(".*.*.tmp"):
        writer = temporary.name.split(".")[-2]
        try:
            if writer.isdecimal():  # else it is not one of ours
                os.kill(int(writer), 0)  # asks whether that process is there
        except (ProcessLookupError, OverflowError):
            temporary.unlink(missing_ok=True)
        except PermissionError:  # it is, and somebody else's
            pass


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library when it is first needed; UserError says how to install it.

    extra: the project's extra that has it, or a file of requirements.
    """
    try:
        library = importlib.import_module(module)
        base = {"transformers": "PreTrainedModel", "diffusers": "AutoencoderKLWan"}.get(module)
        if base:  # the bars and what is said are ours
            library.logging.disable_progress_bar()
            library.logging.set_verbosity_error()
            getattr(library, base)  # imports most of it: what is broken shows now
        return library
    except Exception as error:  # the library's own, and what it makes of another one's
        if isinstance(error, ImportError) and error.name == module:
            what = f'"semanticgen[{extra}]"' if "." not in extra else f"--no-deps -r {extra}"
            raise UserError(f"{module} is missing: pip install {what}") from None
        while cause := error.__cause__ or error.__context__:
            error = cause
        hint = ""
        if "torchvision" in str(error):  # one that does not fit torch spoils both libraries
            hint = " (nothing here needs torchvision: pip uninstall torchvision)"
        raise UserError(f"{module} cannot be imported: {first_line(error)}{hint}") from None
