"""`cluster`: the machines a Slurm job asks for."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class ClusterConfig:
    """What the layout has to fit."""

    nodes: int = option(1, low=1, help="number of nodes", resume=True)
    gpus_per_node: int = option(0, low=0, help="GPUs (ranks) per node; 0: as launched", resume=True)
