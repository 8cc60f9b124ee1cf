"""The verbs: `python -m recipes.<verb> CONFIG.yaml key=value ...`, under torchrun or srun for several ranks."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; hides a notice on NUMA nodes
