"""Texts of user turns: of their `{placeholder}`s only named ones are touched, so `\\boxed{}` stays as it is."""

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


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: Python's may hold one half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
