"""`python -m nemo_r3.config`: print docs/config.md."""

from nemo_r3.config.reference import reference

print(reference(), end="")
