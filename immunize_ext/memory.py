"""Memory of large outputs on the CPU, which waits from one call for the next.

A training loop asks for the same few hundred megabytes in every step and gives them back. malloc
returns such memory to the system, and fetching it again costs a page fault every 4 KiB. The
compiled merge therefore keeps what its large outputs and gradients (from 512 KiB) gave back, until
32 calls had no use for it, and never more than was in use at once in those calls. No memory is
shared between live tensors. ``IMMUNIZE_EXT_POOL=0`` in the environment turns this off.
"""

from __future__ import annotations

from immunize_ext import _load


def cached_bytes() -> int:
    """Bytes of CPU memory that wait for the next large output.

    Returns:
        The bytes; 0 without compiled operators, which alone keep any.

    Example:
        >>> from immunize_ext.memory import cached_bytes
        >>> cached_bytes()
        0
    """
    if not _load.available():
        return 0
    from immunize_ext import _C

    return _C.cached_bytes()


def empty_cache() -> int:
    """Give the CPU memory that waits for large outputs back to the system.

    Live tensors keep theirs. The next call fetches its memory anew, which is slower once.

    Returns:
        How many bytes were given back.

    Example:
        >>> from immunize_ext.memory import cached_bytes, empty_cache
        >>> released = empty_cache()
        >>> cached_bytes()
        0
    """
    if not _load.available():
        return 0
    from immunize_ext import _C

    return _C.empty_cache()
