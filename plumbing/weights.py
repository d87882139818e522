"""Released weights: where they lie, what is in them, and whether all of it is used.

Weights come from a folder or from a hub id (`Qwen/Qwen2.5-VL-3B-Instruct`) that the user names.
Of a hub repository only the files that are asked for are fetched; what is in the hub's cache is
read without a network (`HF_HUB_OFFLINE=1`). Only safetensors are read: other files can run code.
The same files are digested and loaded, and each of their tensors has to be one of the model's.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from plumbing.files import UserError, first_line, read_json, require

TOKENIZER = (  # the files that one may consist of
    *("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
STORED = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64


def locate(weights: str, name: str) -> Path | None:
    """Return the local path of a file of released weights, or None if they have no such file.

    weights: a folder, or a hub id (a file that is not in the hub's cache yet is fetched).
    UserError if neither is there.
    """
    if Path(weights).is_dir():
        file = Path(weights) / name
        return file if file.is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or Path(weights).exists():
        raise UserError(f"{weights}: neither a folder with weights nor a hub id such as owner/name")
    require("huggingface_hub", "qwen")
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    cached = Path(constants.HF_HUB_CACHE, f"models--{weights.replace('/', '--')}")
    main = cached / "refs/main"
    # All files are of one commit: the one that the first of them was fetched at.
    pinned = {"revision": main.read_text().strip()} if main.is_file() else {}
    try:
        found = try_to_load_from_cache(weights, name, constants.HF_HUB_CACHE)
        if found is None:  # neither a path nor the mark of a file that the repository does not have
            found = hf_hub_download(weights, name, **pinned)
        return Path(found) if isinstance(found, str) else None
    except Exception as error:  # no network, no such repository, no permission: many classes
        offline = isinstance(error, errors.LocalEntryNotFoundError)  # then the cache has to do
        if isinstance(error, errors.EntryNotFoundError) and (cached.is_dir() or not offline):
            return None
        raise UserError(
            f"{weights} is no folder, and as a hub id it cannot be had: {first_line(error)}"
        ) from None


@contextlib.contextmanager
def loading(weights: str, kind: str):
    """Say in one line what a library raises while it loads weights of some kind.

    The library's random initial values leave the caller's random numbers as they are.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except UserError:
        raise
    except Exception as error:  # OSError, SafetensorError, its own for settings, ...: many classes
        raise UserError(f"{weights}: not {kind} ({first_line(error)})") from None


def read_settings(weights: str, name: str = "config.json") -> dict:
    """Return what a JSON file of the weights holds; UserError if it is not there or no object."""
    file = locate(weights, name)
    if file is None:
        raise UserError(f"{weights} has no {name}: not the weights of a model")
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise UserError(f"{file}: expected an object of settings")
    return settings


def size(weights: str, settings: dict, *names: str, default: int | None = None) -> int:
    """Return the first of these sizes that the settings name; UserError if it is none."""
    value = next((settings[name] for name in names if name in settings), default)
    if type(value) is not int or value < 1:
        what = " or ".join(names)
        raise UserError(f"{weights}: config.json needs a whole number {what}, not {value!r}")
    return value


def tensor_files(
    weights: str, wanted: Callable[[str], object] = bool, stem: str = "model"
) -> dict[str, Path]:
    """Return {tensor name: file} for the wanted tensors of safetensors, in shards or in one file.

    stem: folder and beginning of the files' names, such as "vae/diffusion_pytorch_model". Shards
    lie beside their index. Only the files that hold what is wanted are fetched.
    """
    beside = stem[: stem.rfind("/") + 1]
    places = read_index(weights, f"{stem}.safetensors.index.json")  # {tensor name: shard}
    needed = sorted({shard for name, shard in places.items() if wanted(name)})
    files = {shard: locate(weights, beside + shard) for shard in needed}
    missing = [beside + shard for shard, file in files.items() if file is None]
    if missing or not places:  # an index of shards that are not there may be a leftover
        if single := locate(weights, f"{stem}.safetensors"):
            return {name: single for name in tensor_names(single) if wanted(name)}
        if missing:
            raise UserError(f"{weights} lacks {', '.join(missing)}, which its index names")
        settings = locate(weights, f"{beside}config.json")
        there = settings.parent.iterdir() if settings else []
        there = sorted(x.name for x in there if x.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        other = f"; {', '.join(there)} cannot be read instead" if there else ""
        raise UserError(f"{weights} has no {stem}.safetensors and no index of its shards{other}")
    found = {name: file for file in files.values() for name in tensor_names(file) if wanted(name)}
    return found | {name: files[shard] for name, shard in places.items() if wanted(name)}


def read_index(weights: str, name: str) -> dict[str, str]:
    """Return {tensor name: shard beside the index}, or nothing where there is no index."""
    file = locate(weights, name)
    if file is None:
        return {}
    content = read_json(file)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{file} is not an index of safetensors")
    for shard in places.values():
        if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise UserError(f"{file} names {shard}: not a safetensors file beside it")
    return places


def tensor_names(file: Path) -> list[str]:
    """Return the names in a safetensors file; UserError if it is damaged or of another kind."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            return list(content.keys())
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not readable as safetensors: {error}") from None


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a safetensors file, mapped: its memory is read when it is used."""
    try:
        with safetensors.safe_open(file, "pt") as content:  # anew each time: what is read is let go
            return content.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: {name} cannot be read: {error}") from None


def check_names(weights: str, missing: Iterable[str], foreign: Iterable[str]):
    """Raise UserError if a model's tensors are missing, or if others are there.

    A tensor that the model does not know, such as the scale of quantised weights, changes what the
    others mean.
    """
    for names, what in ((missing, "lacks"), (foreign, "has, but should not,")):
        if odd := sorted(names):
            more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
            raise UserError(f"{weights} {what} {odd[0]}{more}: not the weights it says")


def check_shape(where: str, found: Sequence[int], expected: Sequence[int]):
    """Raise UserError if a tensor is of another shape than the model's."""
    if tuple(found) != tuple(expected):
        raise UserError(f"{where} is {tuple(found)}, expected {tuple(expected)}")


def check_stored(where: str, tensor: Tensor):
    """Raise UserError if a tensor is quantised: of 8 bits or fewer a number."""
    if tensor.dtype not in STORED:
        raise UserError(f"{where} is stored as {tensor.dtype}: quantised weights are not read here")


def fill(
    model: nn.Module,
    weights: str,
    files: dict[str, Path],
    dtype: torch.dtype,
    rename: Callable[[str], str] = str,
):
    """Give a model that was built on the meta device its tensors, in dtype, one after the other.

    files: {tensor name: file} of `tensor_files`; rename: from these names to the model's. Besides
    the model at most one tensor is in memory. UserError if any is missing, foreign, of another
    shape or quantised.
    """
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    sources = {rename(name): (file, name) for name, file in files.items()}
    check_names(weights, shapes.keys() - sources.keys(), sources.keys() - shapes.keys())
    if len(sources) < len(files):
        raise UserError(f"{weights} holds tensors twice, under two names")
    tensors = {}
    for name, (file, there) in sources.items():
        source = read_tensor(file, there)
        check_shape(f"{file}: {there}", source.shape, shapes[name])
        check_stored(f"{file}: {there}", source)
        tensors[name] = source.to(dtype, copy=True)
    model.load_state_dict(tensors, assign=True)


def tokenizer_files(weights: str, folder: str = "") -> list[Path]:
    """Return the files of a tokenizer in a folder ("tokenizer/"); UserError if there is none."""
    found = [file for name in TOKENIZER if (file := locate(weights, folder + name))]
    if not found:
        raise UserError(f"{weights} has no tokenizer, such as {folder}{TOKENIZER[0]}")
    return found


def load_text_model(weights: str, folder: str, dtype: torch.dtype, heads: re.Pattern) -> nn.Module:
    """Return a text encoder that transformers builds from these weights: it knows older names.

    folder: where in the weights, such as "text_encoder/"; heads: a pattern of names of tensors that
    only training needs. UserError if any other is missing, foreign, of another shape or quantised.
    """
    transformers = require("transformers", "text")
    settings = transformers.AutoConfig.from_pretrained(
        locate(weights, f"{folder}config.json").parent, trust_remote_code=False
    )
    files = tensor_files(weights, stem=f"{folder}model")
    tensors = {name: read_tensor(file, name) for name, file in files.items()}
    kind = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING[type(settings)]
    model, report = kind.from_pretrained(
        None,  # no place to look for others
        config=settings,
        state_dict=tensors,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
    )
    lost, odd = (
        {name for name in report[names] if not heads.match(name)}
        for names in ("missing_keys", "unexpected_keys")
    )
    check_names(weights, lost, odd)
    for name, found, expected in report["mismatched_keys"]:
        check_shape(f"{weights}: {name}", found, expected)
    for name, tensor in tensors.items():
        check_stored(f"{weights}: {name}", tensor)
    return model


@cache
def digest_of(path: Path, *version: int) -> bytes:
    """Return a file's SHA-256; version: what changes with its content. Some files have 20 GB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def digest(files: Collection[Path]) -> str:
    """Return 16 hexadecimal digits that stand for the content of files (SHA-256)."""
    total = hashlib.sha256()
    for path in sorted(set(files)):
        found = path.stat()
        version = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        total.update(digest_of(path.absolute(), *version))
    return total.hexdigest()[:16]
