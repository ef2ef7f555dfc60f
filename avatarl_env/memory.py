"""Memory limits, checked before anything large is built."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 2**30


def memory_limit() -> int:
    """Return the memory that this process may use, bytes.

    That is the machine's memory, or less if the process or its control group has a limit.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if _has_sysconf() else []
    limits += [limit for limit in (_address_space(), *_control_groups()) if limit is not None]
    return min(limits, default=2**63)


def check_memory(argument: str, needed: int, limit: int | None = None) -> None:
    """Raise a ValueError if something needs more memory than is available.

    Args:
        argument: name of the consumer in the message.
        needed: lower bound of the need, bytes.
        limit: memory available, bytes; default `memory_limit()`.
    """
    limit = memory_limit() if limit is None else limit
    if needed > limit:
        raise ValueError(
            f"{argument} must fit the memory, {limit / GIB:.1f} GiB, got a need of at least "
            f"{_gib(needed)} GiB"
        )


def _gib(count: int) -> str:
    """Format bytes in GiB; very large integers as a power of two."""
    return f"{count / GIB:,.1f}" if count < 2**60 else f"2^{count.bit_length() - 31}"


def _has_sysconf() -> bool:
    return "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not on this system
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _control_groups(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int | None]:
    """Return the limits of the process's control group and of its parents."""
    try:
        lines = own.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    files = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers not in ("", "memory") or not inside.startswith("/"):
            continue
        base = root / controllers
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        here = base / inside.lstrip("/")
        files += [
            place / name for place in (here, *here.parents) if base in (place, *place.parents)
        ]
    return [_number_in(file) for file in files]


def _number_in(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
