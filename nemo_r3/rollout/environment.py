"""What vLLM needs to find in the process before it is imported, and what it cannot do on a CPU."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture, architecture_of, model_path

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths of vLLM's CPU attention; with any other it fails at the first token, not at start-up."""
CPU_EXPERT_COLUMNS = 32
"""What an expert's columns on a rank must be a multiple of on a CPU: vLLM would pad others, and fail at a refit."""
CACHES = {
    "XDG_CACHE_HOME": "",  # of vLLM
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "MPLCONFIGDIR": "matplotlib",
}
"""Where libraries keep what they compile, by default in the home directory -> the name in `<run.dir>/.cache`."""
COMPILERS = (
    "VLLM_USE_DEEP_GEMM",  # FP8's blocks: CUTLASS multiplies them instead
    "VLLM_ALLREDUCE_USE_FLASHINFER",  # engines of several GPUs: vLLM's own all-reduce instead
)
"""What vLLM uses on a GPU without asking whether there is nvcc, with which it compiles its kernels at run time."""


def prepare(config: Config, on_cuda: bool) -> None:
    """Refuses what the engine cannot run, then sets the environment that vLLM reads when it is imported.

    Values that a user has already set stay, but for the two that the design rests on: the engine lives in this
    process, and on a CPU nothing is compiled. Without a home that can be written, CACHES are in the run directory.
    Of the disk, only `model.path`'s config.json is read.

    Raises:
        ConfigError: vLLM on a CPU lacks the model's head width or its experts', or a task's module has imported vLLM.
    """
    if not on_cuda:
        _check_cpu(architecture_of(model_path(config)), config.rollout.tensor_parallel)
    if "vllm" in sys.modules:
        raise ConfigError(
            f"task.name: {config.task.name} imports vllm, whose environment is not ready yet; a task may use it only "
            "in a process of its own, see nemo_r3.tasks.worker"
        )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_PLUGINS", "")  # nemo-toolkit registers one that prints a traceback on every rank
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not _home_can_be_written():
        for name, folder in CACHES.items():
            os.environ.setdefault(name, str(Path(config.run.dir, ".cache", folder).absolute()))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_cuda else "ERROR")
    warnings.filterwarnings("ignore", message="`torch.distributed\\..*` is deprecated", category=FutureWarning)
    if on_cuda:
        for name in COMPILERS:
            os.environ.setdefault(name, "0")
    else:
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the other one needs triton
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks share cores with their own actor
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # an eager engine still compiles its sampler: 44 s against 1 s


def _check_cpu(arch: Architecture, ways: int) -> None:
    """Refuses what vLLM's kernels for CPUs lack; `ways` is the engine's tensor parallelism."""
    if arch.head_dim not in CPU_HEAD_DIMS:
        allowed = ", ".join(map(str, CPU_HEAD_DIMS))
        raise ConfigError(f"model.path: head_dim {arch.head_dim} does not run in vLLM on a CPU (it has {allowed})")
    if arch.experts and (columns := arch.ffn_hidden_size // ways) % CPU_EXPERT_COLUMNS:
        raise ConfigError(
            f"model.path: experts of {columns} columns on a rank (rollout.tensor_parallel={ways}) do not run in vLLM "
            f"on a CPU: they must be a multiple of {CPU_EXPERT_COLUMNS}"
        )


def _home_can_be_written() -> bool:
    try:
        cache = Path.home() / ".cache"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home
        return False
    return os.access(cache, os.W_OK)
