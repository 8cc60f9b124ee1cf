"""The verbs: `python -m recipes.<verb> CONFIG.yaml key=value ...`, under torchrun or srun for several ranks."""

import os
import signal
import sys
from types import TracebackType

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; hides a notice on NUMA nodes
# read then, too: a thread without work sleeps, where by default it spins and takes the core from Python and others
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says what to do about a package that is not installed, in a line instead of a stack."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:  # without a name it is not Python's
        return sys.__excepthook__(kind, error, trace)
    print(
        f"error: {sys.executable} has no {error.name}: activate the environment first (. .venv/bin/activate), or make "
        "it (make setup)",
        file=sys.stderr,
    )
    sys.exit(2)


if sys.argv[0] == "-m":  # a verb is being found, and imports what it needs
    sys.excepthook = _explain
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends it without a traceback of torch's import, until `entry.main` says more
        signal.signal(signal.SIGINT, signal.SIG_DFL)
