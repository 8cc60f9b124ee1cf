"""Which launches are refused, what ranks share, and what seeds them."""

from __future__ import annotations

import os
import random
import resource
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from refusals import refusal

from nemo_r3 import runtime, signals
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.runtime import World


def test_ranks_that_do_not_fit_the_layout_are_refused_before_any_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    config = Config()
    config.actor.tensor_parallel = 2
    expected = "2 * 1 = 2 does not divide the world: 3 ranks were launched"
    assert expected in refusal(lambda: runtime.start(config))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("launched", "store", "port"),
    [
        ({"WORLD_SIZE": "1"}, "its own", "4711"),
        ({"WORLD_SIZE": "1", "MASTER_PORT": "29500"}, None, "29500"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, None, "29500"),
    ],
)
def test_only_a_lone_rank_that_was_given_no_port_finds_one(
    monkeypatch: pytest.MonkeyPatch, launched: dict[str, str], store: str | None, port: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], **launched})
    for name in ("signals.listen", "watchdog.watch", "_allow_open_files", "_name_interface"):
        monkeypatch.setattr(f"nemo_r3.runtime.{name}", Mock())
    own, joined = Mock(port=4711), Mock(side_effect=InterruptedError)
    monkeypatch.setattr(torch.distributed, "TCPStore", Mock(return_value=own))
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    with pytest.raises(InterruptedError):
        runtime.start(Config())
    assert joined.call_args.kwargs["store"] is (own if store else None)
    assert (os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT")) == ("127.0.0.1", port)


def test_a_rank_may_open_as_many_files_as_the_system_lets_it() -> None:
    """Gloo opens a socket for every other rank of every group."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        runtime._allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_what_rank_0_finds_or_refuses_is_every_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(World, "broadcast", lambda self, item: said.append(item) or item if self.is_main else said[-1])
    main, other = (World(rank, 2, torch.device("cpu"), cast(Any, None), timedelta(1)) for rank in (0, 1))
    assert main.on_main(lambda: 3) == other.on_main(lambda: pytest.fail("rank 1 acts")) == 3

    def refuse() -> None:
        raise ConfigError("model.path: mend me")

    for world in (main, other):
        with pytest.raises(ConfigError, match="mend me"):
            world.on_main(refuse)


def test_all_ranks_leave_if_any_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str | None] = [None]
    monkeypatch.setattr(World, "gather", lambda self, item: [item, *others])
    world = World(0, 2, torch.device("cpu"), cast(Any, None), timedelta(1))
    world.leave_if_asked()
    others[0] = "SIGTERM"
    with pytest.raises(signals.Stopped, match="^stopped by SIGTERM$"):
        world.leave_if_asked()


def test_nodes_with_gpus_and_without_make_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("a", "cuda"), ("c", "cpu"), ("b", "cpu"), ("c", "cpu")]
    monkeypatch.setattr(World, "gather", lambda self, item: found)
    world = World(0, 4, torch.device("cpu"), cast(Any, None), timedelta(1))
    with pytest.raises(UserError, match="CUDA finds no GPU on b, c, but finds some on the other nodes"):
        runtime._refuse_mixed_devices(world)
    found[:] = [("a", "cuda"), ("b", "cuda")]
    runtime._refuse_mixed_devices(world)


def test_a_steps_draws_depend_on_seed_and_step_alone() -> None:
    def draws(seed: int, step: int) -> tuple[float, float]:
        runtime.seed_generators(seed, step)
        return random.random(), torch.rand(()).item()

    first = draws(1, 5)
    draws(1, 6)
    assert draws(1, 5) == first
    assert len({draws(seed, step) for seed in range(3) for step in range(3)}) == 9


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN | MEETING, ("3", "4", "1")),
        (SRUN | MEETING | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}, ("5", "8", "2")),  # torchrun under srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (None, None, None)),  # a batch script's own process
    ],
)
def test_ranks_are_those_of_whoever_started_them(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    monkeypatch.setattr(os, "environ", dict(environment))
    runtime._read_srun()
    assert tuple(map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN | {"MASTER_ADDR": "n1"}, "4 ranks were started, and the environment has no MASTER_PORT: export"),
        ({"WORLD_SIZE": "2"}, "has no MASTER_ADDR and no MASTER_PORT: export MASTER_ADDR (the first host)"),
        ({"RANK": "x"}, "RANK='x' is not a whole number from 0"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' is not a whole number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x' is not a whole number"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT=99999999 is not a port, which is below 65536"),
        (SRUN | MEETING | {"MASTER_ADDR": "n1.invalid"}, "MASTER_ADDR='n1.invalid' is no host that"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_ranks_that_cannot_meet_are_refused_by_the_variable(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(environment))
    assert expected in refusal(lambda: runtime.start(Config()))
    assert not torch.distributed.is_initialized()


ROUTES = """Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
ib0\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
"""


@pytest.mark.parametrize(
    ("environment", "address", "chosen"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, "127.0.1.1", "eth0"),
        ({"SLURM_STEP_NUM_NODES": "2"}, "127.0.1.1", "eth0"),
        ({"LOCAL_WORLD_SIZE": "4"}, "127.0.1.1", None),
        ({"LOCAL_WORLD_SIZE": "2"}, "192.168.1.7", None),
        ({"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "ib0"}, "127.0.1.1", "ib0"),
    ],
)
def test_between_nodes_gloo_never_announces_a_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], address: str, chosen: str | None
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_NODES", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "route").write_text(ROUTES)
    monkeypatch.setattr(runtime, "ROUTES", tmp_path / "route")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    runtime._name_interface(4)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert runtime.default_interface(ROUTES.partition("wlan0")[0]) is None, "without a default route"


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_NODES"])
def test_a_number_of_nodes_that_is_none_is_refused_by_the_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "environ", {name: "x"})
    assert f"{name}='x' is not a whole number from 0" in refusal(lambda: runtime._name_interface(1))


@pytest.mark.parametrize(
    ("works", "count", "expected"),
    [(False, 8, "has 8 GPUs, but CUDA does not start on them"), (True, 1, "local rank 1 on .* sees 1 GPUs")],
)
def test_gpus_that_cannot_be_used_are_no_reason_to_run_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, works: bool, count: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=expected):
        runtime._has_cuda(local=1)


def test_a_failed_collective_is_known_by_its_type_or_by_the_path_in_gloos_message() -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert runtime.is_collective(lost) and runtime.is_collective(torch.distributed.DistNetworkError("no route"))
    assert not runtime.is_collective(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"))
