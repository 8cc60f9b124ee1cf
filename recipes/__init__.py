"""The verbs: `python -m recipes.<verb> CONFIG.yaml key=value ...`, under torchrun or srun for several ranks."""

import importlib.util
import os
import signal
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; hides a notice on NUMA nodes
# read then, too: a thread without work sleeps, where by default it spins and takes the core from Python and others
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # a verb is being found: Ctrl-C ends it without a traceback of torch's import, until `entry.main` says more
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.argv[0] == "-m" and importlib.util.find_spec("torch") is None:
    print(
        f"error: {sys.executable} has no torch: activate the environment first (. .venv/bin/activate), or make it "
        "(make setup)",
        file=sys.stderr,
    )
    sys.exit(2)
