"""How many GPUs CUDA sees: `python3 -m slurm.cuda_devices` prints it, or says why CUDA does not start.

The health check runs this in a process of its own, because CUDA may hang. Only Python's own library is imported.
"""

from __future__ import annotations

import ctypes
import sys

DRIVER = "libcuda.so.1"


def count() -> int:
    """The number of devices that a rank of this node could use.

    Raises:
        OSError: the driver's library cannot be loaded.
        RuntimeError: CUDA's own message.
    """
    driver = ctypes.CDLL(DRIVER)
    devices, message = ctypes.c_int(), ctypes.c_char_p()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(devices))
    if code:
        driver.cuGetErrorString(code, ctypes.byref(message))
        raise RuntimeError(f"error {code}, {(message.value or b'unknown to the driver').decode()}")
    return devices.value


if __name__ == "__main__":
    try:
        print(count())
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
