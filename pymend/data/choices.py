"""Choices that depend on texts and a seed only: the same on every machine and Python version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def hashed(*key: object) -> int:
    """A number that depends on the key's text only, unlike ``hash()``."""
    text = "\n".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def pick(candidates: Iterable[str], count: int, *key: object) -> list[str]:
    """``count`` distinct candidates (fewer if there are fewer), chosen by hash."""
    return sorted(candidates, key=lambda c: hashed(*key, c))[:count]


def draw(pool: Sequence[T], count: int, allowed: Callable[[T], bool], *key: object) -> list[T]:
    """``count`` places of ``pool`` whose item is ``allowed`` (fewer if there are fewer).

    In contrast to :func:`pick` it looks at a few items only, however large the pool.
    """
    return list(islice((x for x in _shuffled(pool, key) if allowed(x)), count))


def _shuffled(pool: Sequence[T], key: tuple[object, ...]) -> Iterator[T]:
    """The items in random order: Fisher and Yates' shuffle, of which only moves are kept."""
    moved: dict[int, int] = {}
    for i in range(len(pool)):
        j = i + hashed(*key, i) % (len(pool) - i)
        yield pool[moved.get(j, j)]
        moved[j] = moved.get(i, i)
