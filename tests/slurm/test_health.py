"""What makes a node unfit; no Slurm is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from slurm import cuda_devices, health

DRIVER = """\
int cuInit(unsigned flags) { return %(code)d; }
int cuDeviceGetCount(int *count) { *count = %(count)d; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "system not yet initialized"; return 0; }
"""


def driver(folder: Path, code: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A libcuda.so.1 that starts with a code, and sees some devices."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    source = folder / "driver.c"
    source.write_text(DRIVER % {"code": code, "count": count})
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


def test_cuda_must_start_and_see_what_was_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path, 0, 2, monkeypatch)
    assert health.wrong_with_gpus(0) == health.wrong_with_gpus(2) == ""
    assert health.wrong_with_gpus(8) == "CUDA sees 2 GPUs, 8 were allocated"
    driver(tmp_path, 802, 0, monkeypatch)  # without a fabric manager
    told = "2 GPUs were allocated, and CUDA does not start: error 802, system not yet initialized"
    assert health.wrong_with_gpus(2) == told
    monkeypatch.setattr(health, "GPU_SECONDS", 0.001)
    assert health.wrong_with_gpus(2) == "CUDA did not start in 0.001 s"


def test_a_container_may_lack_cudas_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "DRIVER", "libcuda_that_is_not_here.so.1")
    with pytest.raises(OSError, match="libcuda_that_is_not_here.so.1"):
        cuda_devices.count()


def test_room_and_rights_on_disk(tmp_path: Path) -> None:
    assert health.wrong_with_disk(tmp_path, 0) == ""
    assert not list(tmp_path.iterdir())
    assert "GB free, cluster.min_disk_gb=1e+09" in health.wrong_with_disk(tmp_path, 1e9)
    assert "all nodes share" in health.wrong_with_disk(tmp_path / "elsewhere", 0)
    assert "cluster.min_shm_gb=1e+09" in health.wrong_with_shm(1e9)


def test_the_answer_names_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert health.main(str(tmp_path), "0", "0", "0") == 0
    assert health.main(str(tmp_path), "0", "1e9", "0") == 1
    fine, sick = capsys.readouterr().out.splitlines()
    assert fine == "n7: fine" and sick.startswith(f"n7: {tmp_path} has ")
