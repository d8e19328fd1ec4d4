"""The datasets that the section `data` names: their token files, sources and weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm.config.train import DataConfig
from fast_llm.data.datatrove import open_token_file
from fast_llm.data.masks import Masks, masks_path
from fast_llm.data.metadata import read_metadata, resolve_prefix
from fast_llm.data.tokenfile import TokenFile
from fast_llm.errors import DataError

Metadata = dict[str, dict[str, Any]]  # path of a dataset → its dataset.json; {} for a bare prefix


@dataclass(frozen=True)
class Entry:
    """A path of `data.path`, or an entry of `data.sources`."""

    label: str  # the name of the entry of `data.sources`; empty for a path
    path: str
    weight: float
    groups: list[tuple[float, str, list[TokenFile]]]  # share, name and token files of each source
    files: list[TokenFile]


def open_entries(config: DataConfig, metadata: Metadata) -> list[Entry]:
    """Open the datasets of `data.path` or `data.sources`. Adds their content to `metadata`.

    Without weights, entries of `data.sources` have their numbers of tokens as weights.
    """
    given: list[tuple[str, float | None, str]] = []
    if config.format == "mixture":
        given = [(name, one.weight, one.path) for name, one in config.sources.items()]
    elif len(config.path) == 1:
        given = [("", 1.0, str(config.path[0]))]
    else:
        pairs = zip(config.path[::2], config.path[1::2], strict=True)
        given = [("", float(weight), str(path)) for weight, path in pairs]
    entries = []
    for label, weight, path in given:
        setting = f"data.sources.{label}.path" if label else "data.path"
        groups, files = open_path(path, config.format == "file", metadata, setting)
        if weight is None:
            weight = float(sum(file.tokens for _, _, group in groups for file in group))
        if label:
            groups = [(share, label + name.removeprefix(path), one) for share, name, one in groups]
        entries.append(Entry(label, path, weight, groups, files))
    return entries


# Token files of other programs, by their suffix: what they are, and what to do.
_OTHER_FORMATS = {
    ".fast_llm_dataset": "a file of a Fast-LLM version with another format, which is not read;"
    " prepare the documents again with `fast-llm prepare`",
}


def open_path(
    path: str, is_metadata: bool, metadata: Metadata, setting: str = "data.path"
) -> tuple[list[tuple[float, str, list[TokenFile]]], list[TokenFile]]:
    """The sources of a dataset (share of the dataset, name, token files), and all its token files
    in order.

    Token files weighted by their number of tokens, as `prepare` does it, form one source; those
    with other weights form others. `is_metadata`: the path is a dataset.json, whatever its name.
    Adds its content to `metadata`. `setting`: the one that names the path.
    """
    place = Path(path).expanduser()
    if not is_metadata and place.suffix != ".json":
        if place.suffix in (".bin", ".idx"):
            raise DataError(f"{setting}: given {path}, must be without {place.suffix}: {path[:-4]}")
        if place.suffix in _OTHER_FORMATS:
            raise DataError(f"{setting}: {path} is {_OTHER_FORMATS[place.suffix]}")
        if place.is_dir() and not place.with_name(place.name + ".idx").exists():
            read_metadata(place)  # raises an error that names the dataset.json
        metadata.setdefault(str(place), {})
        file = open_token_file(place)
        if masks_path(place).exists():
            file.masks = Masks(place, file.tokens)
        return [(1.0, path, [file])], [file]
    metadata[str(place)] = content = read_metadata(place)
    groups: dict[str, list[tuple[float, TokenFile]]] = {}
    files = []
    for entry in content["datasets"]:
        file = _open_entry(place, entry)
        files.append(file)
        weight = float(entry.get("weight", file.tokens))
        if file.tokens and weight:
            groups.setdefault(f"{weight / file.tokens:.3e}", []).append((weight, file))
    total = math.fsum(weight for group in groups.values() for weight, _ in group)
    if not groups:
        raise DataError(f"{place}: holds no tokens, or gives all of them the weight 0")
    return [
        (
            math.fsum(weight for weight, _ in group) / total,
            path if len(groups) == 1 else f"{path} ({_names(group)})",
            [file for _, file in group],
        )
        for group in groups.values()
    ], files


def _open_entry(path: Path, entry: Mapping[str, Any]) -> TokenFile:
    """A token file of the dataset.json at `path`. Raises DataError if its sizes are not those
    listed.
    """
    file = open_token_file(resolve_prefix(path, entry["prefix"]))
    if "masks" in entry.get("sha256", {}):
        file.masks = Masks(file.prefix, file.tokens)
    for key, found in (
        ("num_tokens", file.tokens),
        ("num_documents", file.documents),
        ("dtype", file.dtype.name),
    ):
        if entry.get(key, found) != found:
            raise DataError(
                f"{file.prefix}: its {key} is {found}, but {path} says {entry[key]}; it was"
                " replaced or belongs to another dataset: prepare the data again"
            )
    return file


def _names(group: Sequence[tuple[float, TokenFile]]) -> str:
    first = group[0][1].prefix.name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"
