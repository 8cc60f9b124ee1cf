"""`{placeholder}` templates of user turns: only named placeholders are touched, so `\\boxed{}` stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def unknown_placeholders(template: str, known: Iterable[str]) -> list[str]:
    """The names in braces in `template` that are not in `known`, in order."""
    allowed = set(known)
    return [name for name in PLACEHOLDER.findall(template) if name not in allowed]


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{name}` replaced by `values[name]`; replaced text is not looked at again.

    Raises:
        KeyError: a placeholder that `values` lacks.
    """
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)
