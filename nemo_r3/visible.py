"""`visible`: text from a model or a data set as a screen may show it, which some of its characters would act on."""

from __future__ import annotations

import re

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""What shows nothing, or changes how the text around it is shown: controls, direction marks, halves of a character."""


def visible(text: str) -> str:
    """A text whose HIDDEN characters are their numbers, as in ⟨U+202E⟩; a line may end in CR LF."""
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))
