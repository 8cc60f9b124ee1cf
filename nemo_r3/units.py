"""Sizes of memory, in words."""

GIB = 2**30


def in_words(count: float) -> str:
    """Bytes in a unit that suits them: "1.2 GiB" or "340.0 MiB"."""
    return f"{count / GIB:.1f} GiB" if count > GIB / 2 else f"{count / 2**20:.1f} MiB"
