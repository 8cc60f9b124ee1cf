"""The policy on megatron-core: build, load, update, export, checkpoint."""

import warnings

# megatron-core warns at import of every optional extension that is absent; where one is needed, we refuse by name
for _message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message)
