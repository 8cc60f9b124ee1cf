"""The verbs: `python -m recipes.<verb> CONFIG.yaml key=value ...`, under torchrun or srun for several ranks."""

import os
import signal
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; hides a notice on NUMA nodes
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # a verb is being found: Ctrl-C ends it without a traceback of torch's import, until `runtime.main` says more
    signal.signal(signal.SIGINT, signal.SIG_DFL)
