"""Data sets of the hub, and local folders of the same form, through ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pymend.data.rows import RawRow, cached_tables

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".json", ".jsonl", ".parquet", ".txt", ".csv", ".yaml")


def names_a_set(source: str) -> bool:
    """Whether ``source`` is NAME[:CONFIG][:SPLIT] of a folder here or of a data set on the hub."""
    name = source.partition(":")[0]
    if Path(source).exists() or Path(name).exists():
        return not Path(source).is_file()
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(FILES)


def read_set(source: str, split: str) -> tuple[str, Iterator[RawRow]]:
    """What was read, in words, and its rows, one at a time from the cache.

    Args:
        source: NAME[:CONFIG][:SPLIT]; of one word behind NAME, a configuration goes before a split.
        split: the one that is read if ``source`` names none and the set has it.

    Raises:
        ValueError: no such set, configuration or split, or one of several to be named.
    """
    name, *words = source.split(":")
    if len(words) > 2:
        raise ValueError(f"{source}: name a data set as NAME[:CONFIG][:SPLIT]")
    if len(words) == 2:
        splits, chosen = _load(name, words[0] or None), words[1]
    elif words and words[0] in _configurations(name):
        splits, chosen = _load(name, words[0]), ""
    else:
        splits, chosen = _load(name, None), "".join(words)
    if not chosen:
        chosen = split if split in splits or len(splits) > 1 else next(iter(splits))
    if chosen not in splits:
        raise ValueError(
            f"{source}: the data set has no split {chosen!r}; name one of its own, "
            f"{name}:SPLIT with {', '.join(splits)}"
        )
    place = f"{source} ({chosen})"
    rows = enumerate(splits[chosen])
    return place, (RawRow(f"{place}, record index {i}", values) for i, values in rows)


def _load(name: str, config: str | None) -> Any:
    """The splits of a data set, by name."""
    import datasets

    try:
        return datasets.load_dataset(name, config, cache_dir=cached_tables())
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _refused(name, error) from error


def _configurations(name: str) -> list[str]:
    """The names of a set's configurations."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(name, cache_dir=cached_tables()))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> ValueError:
    reason = " ".join((str(error) or type(error).__name__).split())[:300]
    if Path(name).is_dir():
        return ValueError(f"{name}: is a folder, and no data set that can be read ({reason})")
    return ValueError(
        f"{name}: no such file or folder, and no data set that can be had from the hub ({reason}); "
        "check the path or the name, or use 'facts', which is built in"
    )
