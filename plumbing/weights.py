"""Released weights: where they lie, what is in them, and whether all of it is used.

Weights come from a folder or from a hub id (`Qwen/Qwen2.5-VL-3B-Instruct`) that the user names.
Of a hub repository only the files that are asked for are fetched. Only safetensors are read.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors

from plumbing.files import UserError, first_line, read_json, require


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
            settings = read_json(file)
            if not isinstance(settings, dict):
                raise UserError(f"{file}: expected an object of settings")
            return settings
    raise UserError(f"{weights} has no {' or '.join(names)}: not the weights of a model")


def tensor_files(weights: str, wanted: Callable[[str], bool], stem="model") -> dict[str, Path]:
    """Return {tensor name: file} for the wanted tensors of sharded or single safetensors.

    Shards lie beside their index. Only the files that hold what is wanted are fetched.
    """
    if index := locate(weights, f"{stem}.safetensors.index.json"):
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
            raise UserError(f"{index} is not an index of safetensors")
        beside = stem[: stem.rfind("/") + 1]
        needed = {shard for name, shard in places.items() if wanted(name)}
        shards = {shard: locate(weights, beside + shard) for shard in sorted(needed)}
        if missing := [beside + shard for shard, file in shards.items() if file is None]:
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


def check_tensors(weights: str, report: dict, not_needed: str):
    """Raise UserError unless a library has used every tensor and has got every one that it needs.

    report: its loading info. not_needed: a pattern of names, of heads that only training needs. A
    tensor that the model does not know, such as the scales of quantised weights, changes what the
    others mean.
    """
    for found, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, but should not,")):
        odd = sorted(name for name in report[found] if not re.match(not_needed, name))
        if odd:
            more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
            raise UserError(f"{weights} {what} {odd[0]}{more}: not the weights it says")


def digest(files: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits that stand for the content of files (SHA-256)."""
    total = hashlib.sha256()
    for path in sorted(set(files)):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
