"""The seed of each scenario's run: drawn anew, but for a run that has failed before.

What failed is run once more, alone. With another seed that would be another run: it could pass
without anything having been said about the one that failed.
"""

import secrets

import pytest


def draw(cache: pytest.Cache, name: str) -> int:
    """Return a seed for a scenario, and keep it until `passed` is called."""
    kept = cache.get(_key(name), None)
    seed = kept if isinstance(kept, int) else secrets.randbelow(1_000_000)
    cache.set(_key(name), seed)
    return seed


def passed(cache: pytest.Cache, name: str) -> None:
    """Forget the seed of a run that went well."""
    cache.set(_key(name), None)


def _key(name: str) -> str:
    # A file for each: workers that run beside each other share the cache.
    return f"crashbus/fault_seeds/{name.encode().hex()[:200]}"
