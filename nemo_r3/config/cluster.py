"""`cluster`: what a Slurm job asks for, how slurm/train.sh starts the ranks, and when it gives up."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class ClusterConfig:
    """What `slurm.launch` and `slurm/train.sh --print` ask of Slurm, and how a job starts its ranks."""

    nodes: int = option(1, low=1, help="number of nodes; 1 with gpus_per_node=0: as launched", resume=True)
    gpus_per_node: int = option(0, low=0, help="GPUs (ranks) per node; 0: as launched", resume=True)
    launcher: str = option(
        "srun",
        choices=["srun", "torchrun"],
        help="what starts a node's ranks: srun one task each, or one torchrun for all",
        resume=True,
    )
    partition: str = option("", help="partition; empty: the cluster's default", resume=True)
    account: str = option("", help="account; empty: the user's default", resume=True)
    time_minutes: int = option(0, low=0, help="time limit of a slice; 0: the partition's default", resume=True)
    cpus_per_task: int = option(0, low=0, help="CPU cores per rank; 0: Slurm's default", resume=True)
    memory_gb: int = option(0, low=0, help="memory per node in GiB (Slurm's G); 0: Slurm's default", resume=True)
    gpu_memory_gb: float = option(
        0.0,
        low=0,
        help="memory of each GPU in GiB, for recipes.plan and slurm.launch; 0: 79, which GPUs sold as 80 GB have; "
        "in recipes.plan, that of a GPU here if there is one",
        resume=True,
    )
    options: list[str] = option(
        factory=list, help="more options of sbatch, such as --exclusive or --qos=long", resume=True
    )
    setup: str = option(
        "", help="shell line that prepares every task, such as `source /shared/venv/bin/activate`", resume=True
    )
    container: str = option("", help="image for pyxis/enroot; empty: no container", resume=True)
    container_mounts: list[str] = option(
        factory=list, help="paths to mount beside the working directory: SOURCE:TARGET", resume=True
    )
    min_disk_gb: float = option(10.0, low=0, help="free GB that a node must see at run.dir to start", resume=True)
    min_shm_gb: float = option(1.0, low=0, help="free GB that a node must have in /dev/shm to start", resume=True)
    health_minutes: int = option(
        5, low=1, help="limit of the nodes' check before the ranks start; a container is imported in it", resume=True
    )
    signal_seconds: int = option(
        600, low=1, help="seconds before the time limit to stop and save; an update and a save must fit in", resume=True
    )
    max_requeues: int = option(
        3, low=0, help="how often a job may be requeued after faults without progress", resume=True
    )
