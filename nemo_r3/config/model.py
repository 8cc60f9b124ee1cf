"""`model`: the Hugging Face checkpoint a run starts from."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class ModelConfig:
    """The starting model, which is also the reference of the KL term."""

    path: str = option(
        "",
        help="directory or hub name of a Hugging Face checkpoint; 'embedded' is the tiny one shipped with nemo_r3",
        resume=True,
    )
