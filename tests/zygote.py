"""Starts programs by forking: a process that has imported the libraries that vLLM and megatron-core stand on.

Importing these takes half of a short program's time. vLLM, megatron-core and all of ours are left to the program, which
imports them as it would in an interpreter of its own: in its order, with the environment that it has prepared. Forks
have one seed for Python's hashes, so they are nothing for ranks, whose sets are to differ in order as they do in a run.

    python zygote.py    reads an order per line from standard input and answers each with the program's exit code
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from typing import Any


def serve() -> None:
    """Forks for each order; the child leaves the loop, becomes the program, and ends as any interpreter does."""
    import aiohttp  # noqa: F401
    import fastapi  # noqa: F401
    import openai.types.responses  # noqa: F401
    import torch._inductor.lowering  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    import transformers.models.auto.auto_factory  # noqa: F401
    import xgrammar  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        if not (child := os.fork()):
            return become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(order: dict[str, Any]) -> None:
    """Goes to the order's directory and environment, and runs its program."""
    for stream, (name, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (order["stdout"], os.O_WRONLY), (order["stderr"], os.O_WRONLY))
    ):
        os.dup2(os.open(name, flags | os.O_APPEND), stream)
    os.chdir(order["path"])
    os.environ.clear()
    os.environ.update(order["environment"])
    program(order["arguments"])


def program(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does, for a script or `-m MODULE`."""
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    first = os.getcwd() if is_module else os.path.dirname(sys.argv[0])
    sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    run = runpy.run_module if is_module else runpy.run_path
    run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if is_module else {}))


if __name__ == "__main__":
    serve()
