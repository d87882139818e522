"""What all rooms share: errors in one line, files written whole or not at all, released weights.

Weights come from a folder or from a hub id (`Qwen/Qwen2.5-VL-3B-Instruct`) that the user names.
Of a hub repository only the files that are asked for are fetched. Only safetensors are read.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import safetensors


class UserError(ValueError):
    """Something the user can put right, in one line."""


def command(main: Callable[[], None]):
    """Run a command line's main: what the user can put right is one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write_file(path: Path, data: bytes):
    """Write a file whole or not at all: to a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path):
    """Remove what writers that were killed have left in a folder; not what one is writing now."""
    for temporary in folder.glob(".*.tmp"):
        try:
            os.kill(int(temporary.name.split(".")[-2]), 0)  # asks whether that process is there
        except (ProcessLookupError, ValueError, OverflowError):
            temporary.unlink(missing_ok=True)
        except PermissionError:  # it is, and somebody else's
            pass


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library when it is first needed; UserError names the extra to install."""
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
            raise UserError(f'{module} is missing: pip install "semanticgen[{extra}]"') from None
        while cause := error.__cause__ or error.__context__:
            error = cause
        hint = ""
        if "torchvision" in str(error):  # one that does not fit torch spoils both libraries
            hint = " (nothing here needs torchvision: pip uninstall torchvision)"
        raise UserError(f"{module} cannot be imported: {first_line(error)}{hint}") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- released weights ---------------------------------------------------------------------------


def locate(weights: str, name: str) -> Path | None:
    """Return the local path of a file of released weights, or None if they have no such file.

    weights: a folder, or a hub id (the file is fetched if it is not in the hub's cache yet).
    UserError if neither is there.
    """
    if Path(weights).is_dir():
        file = Path(weights) / name
        return file if file.is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or Path(weights).exists():
        raise UserError(f"{weights}: neither a folder with weights nor a hub id such as owner/name")
    require("huggingface_hub", "qwen")
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(weights, name))
    except Exception as error:  # no network, no such repository, no permission: many classes
        known = Path(constants.HF_HUB_CACHE, f"models--{weights.replace('/', '--')}").is_dir()
        offline = isinstance(error, errors.LocalEntryNotFoundError)  # then the cache has to do
        if isinstance(error, errors.EntryNotFoundError) and (known or not offline):
            return None
        raise UserError(
            f"{weights} is no folder, and as a hub id it cannot be had: {first_line(error)}"
        ) from None


@contextlib.contextmanager
def loading(weights: str, kind: str):
    """Say in one line what a library raises while it loads weights of some kind."""
    try:
        yield
    except Exception as error:  # OSError, SafetensorError, its own for settings, ...: many classes
        raise UserError(f"{weights}: not {kind} ({first_line(error)})") from None


def read_settings(weights: str, *names: str) -> dict:
    """Return the first JSON file of those names that the weights have; UserError if none."""
    for name in names:
        if file := locate(weights, name):
            try:
                settings = json.loads(file.read_text())
            except ValueError as error:
                raise UserError(f"{file} is not JSON: {error}") from None
            if not isinstance(settings, dict):
                raise UserError(f"{file}: expected an object of settings")
            return settings
    raise UserError(f"{weights} has no {' or '.join(names)}: not the weights of a model")


def tensor_files(weights: str, wanted: Callable[[str], bool], stem="model") -> dict[str, Path]:
    """Return {tensor name: file} for the wanted tensors of sharded or single safetensors.

    Only the files that hold them are fetched.
    """
    if index := locate(weights, f"{stem}.safetensors.index.json"):
        try:
            places = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index} is not an index of safetensors") from None
        shards = {shard: locate(weights, shard) for n, shard in places.items() if wanted(n)}
        if missing := [shard for shard, file in shards.items() if file is None]:
            raise UserError(f"{weights} lacks {', '.join(missing)}, which its index names")
        return {name: shards[shard] for name, shard in places.items() if wanted(name)}
    file = locate(weights, f"{stem}.safetensors")
    if file is None:
        raise UserError(f"{weights} has no {stem}.safetensors and no index of its shards")
    return {name: file for name in tensor_names(file) if wanted(name)}


def tensor_names(file: Path) -> list[str]:
    """Return the names in a safetensors file; UserError if it is damaged or of another kind."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            return list(content.keys())
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not readable as safetensors: {error}") from None


def digest(files: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits that stand for the content of files (SHA-256)."""
    total = hashlib.sha256()
    for path in sorted(set(files)):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
