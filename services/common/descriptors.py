"""How many files a process may have open."""

import resource


def raise_limit() -> int:
    """Raise RLIMIT_NOFILE as far as it goes and return it; getrlimit(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
