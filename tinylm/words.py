"""Numbers in words, the same everywhere a person reads them, and where that person reads."""

from __future__ import annotations

import sys


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel. A notebook shows what goes to stderr as if it were trouble."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def quantity(value: float) -> str:
    """A count that may span many sizes: 39.6k, 1.2M, 340M, 2B; from 1e+15 on as a power of ten."""
    if abs(value) >= 1e15 * (1 - 5e-4):
        return f"{value:.3g}"
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 5e-4):
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds to two digits or so: 45 s, 8 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
