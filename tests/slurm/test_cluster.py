"""The virtual cluster itself: what it is, and that tearing it down hurts nobody."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.slurm


def test_nodes_have_names_and_gpus_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo $(hostname) $(getent hosts n2) $CUDA_VISIBLE_DEVICES'\n")
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", str(script))
    assert cluster.wait(job, 60) == "COMPLETED"
    assert sorted(cluster.output(job).splitlines()) == ["n1 127.0.1.2 n2 0,1", "n2 127.0.1.2 n2 0,1"]
    assert "n1" not in Path("/etc/hosts").read_text().split(), "the host's own file is not touched"


def test_tear_down_signals_only_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its PID namespace slurmd is process 1 and writes that down: whoever trusts the file kills the host's init."""
    if why := Cluster.lacks():
        pytest.skip(why)
    started: set[int] = set()
    signalled: list[int] = []
    kill = os.kill

    virtual = Cluster(tmp_path, 1)
    virtual.start()
    try:
        assert (tmp_path / "n1.pid").read_text().strip() == "1", "the trap is there"
        started = {daemon.pid for daemon in virtual._daemons.values()}

        def recorded(pid: int, number: int) -> None:
            signalled.append(pid)
            kill(pid, number)

        monkeypatch.setattr(os, "kill", recorded)
        virtual.power_cut("n1")
    finally:
        virtual.stop()
    assert sorted(signalled) == sorted(started)
    assert 1 not in signalled
    virtual.stop()  # again: nothing is left to signal
    assert len(signalled) == len(started)
    with pytest.raises(ProcessLookupError):
        kill(max(started), signal.SIGCONT)
