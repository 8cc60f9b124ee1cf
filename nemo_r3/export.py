"""A trained policy as a Hugging Face directory: checked against the actor, written whole or not at all.

    policy.export_hf()  -> model*.safetensors               one shard in memory at a time   \\
    starting checkpoint -> config, tokenizer, chat template, licence                         > <out>.writing
    model_card()        -> README.md                                                        /
    <out>.writing, reloaded by transformers, gives the actor's log-probabilities? -> renamed to <out>, else removed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nemo_r3 import watchdog
from nemo_r3.config import Config
from nemo_r3.dialogue import read_tokenizer
from nemo_r3.errors import UserError
from nemo_r3.models import architecture_of
from nemo_r3.models.architecture import read_hf_config
from nemo_r3.models.location import TERMS
from nemo_r3.precision import precision_of

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy

SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-4
"""Largest difference of fp32 log-probabilities: the order of summation differs, some 1e-6 per layer."""
MOST_NOISE, MEAN_NOISE = 4.0, 2.0
"""Below fp32: how many times transformers' own rounding error the actor may be off, see `agreement`."""
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    *TERMS,
)
"""What the export copies from the starting checkpoint."""


def refuse_other_contents(*places: Path) -> None:
    """Refuses to export to where something else is, all of which an export would replace, or twice to one directory.

    Raises:
        UserError: there is a file, or a directory that holds files and is no earlier export; or two places are one.
    """
    if len({out.resolve() for out in places}) < len(places):
        raise UserError(
            f"{' and '.join(map(str, places))} are one directory, {places[0].resolve()}, where each export would "
            "replace the other: link them to two, or remove a link"
        )
    for out in places:
        card = out / "README.md"
        if not (out.is_file() or (out.is_dir() and any(out.iterdir()))):
            continue
        if not (card.is_file() and "Trained with nemo_r3" in card.read_text(errors="replace")):
            place = f"{out} links to {out.resolve()}, which" if out.is_symlink() else out
            raise UserError(
                f"{place} holds something else than an export, and an export would replace it: move it away, or make "
                "this a link to a directory that is new or empty"
            )


def export(policy: Policy, source: Path, out: Path, card: str, probe: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Writes the policy to `out`, reloads it with transformers and compares log-probabilities; every rank calls this.

    An existing `out` is replaced once the new one has passed. The comparison runs on rank 0's CPU, which holds the
    model once more for it (in fp32).

    Args:
        policy: on every rank.
        source: the starting checkpoint, which gives config.json and the tokenizer.
        out: the directory to write.
        card: the text of its README.md.
        probe: token ids to compare log-probabilities on, each of at least two tokens.

    Returns:
        The largest absolute difference of a token's log-probability between the actor and the reloaded export, and how
        much rounding explains.

    Raises:
        UserError: they differ beyond tolerance, or the directory cannot be written. Nothing is left behind.
    """
    expected = policy.score(probe)
    out = out.resolve()  # a link to another disk stays one, and the files go there
    writing = out.with_name(f"{out.name}.writing")
    shards = _Shards(writing) if policy.world.is_main else None

    def finish() -> tuple[float, float]:
        assert shards is not None, "rank 0 has them"
        try:
            shards.close()
            _write_others(writing, source, card, policy.config)
            found = _compare(writing, probe, expected, policy.config)
            replace(out, writing)
        except (OSError, SafetensorError) as error:
            raise cannot_write(out, error) from error
        except UserError as error:
            raise UserError(f"{error}; {out} was not written") from error
        return found

    try:
        for name, tensor in policy.export_hf():
            if shards:
                shards.add(name, tensor)
            policy.world.barrier()  # or the other ranks would run ahead, and wait for all files in one collective
        return policy.world.on_main(finish)
    finally:
        if shards:
            shutil.rmtree(writing, ignore_errors=True)


class _Shards:
    """Writes tensors to safetensors files of at most SHARD_BYTES, holding one file's tensors at a time.

    An error is kept until `close`, so that the stream of tensors, in which all ranks take part, runs to its end.
    """

    def __init__(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # what a killed export left
        self.directory = directory
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []
        self._failure: OSError | SafetensorError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of a tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > SHARD_BYTES:
            self._write()
        if self._failure is None:
            self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._held_bytes += size

    def _write(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self._part(len(self._files))
            save_tensors(self._held, file)
        except (OSError, SafetensorError) as error:
            self._failure = error
        self._files.append(list(self._held))
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"

    def close(self) -> None:
        """Writes the last file, renames all files and writes their index."""
        if self._failure is None:
            self._write()
        if self._failure is not None:
            raise self._failure
        if len(self._files) == 1:
            self._part(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._part(number).rename(self.directory / file)
            weight_map |= dict.fromkeys(tensors, file)
        write_json(
            self.directory / "model.safetensors.index.json",
            {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map},
        )


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is as readable as its directory; safetensors' own is read by its owner alone."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented object."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def copy_files(source: Path, patterns: Sequence[str], directory: Path) -> None:
    """Copies the files of a directory that match one of some patterns."""
    for pattern in patterns:
        for file in filter(Path.is_file, source.glob(pattern)):  # LICENSES may be a directory
            shutil.copyfile(file, directory / file.name)


def _write_others(directory: Path, source: Path, card: str, config: Config) -> None:
    """Writes everything but the weights, from the starting checkpoint's files and with the actor's dtype.

    Raises:
        UserError: the tokenizer would not be the starting checkpoint's.
    """
    hf = read_hf_config(source)
    hf.pop("torch_dtype", None)  # the old name of dtype
    hf.pop("auto_map", None)  # it names Python files that an export neither has nor needs
    write_json(directory / "config.json", {**hf, "dtype": precision_of(config).dtype_name})
    copy_files(source, COPIED, directory)
    if not (directory / "generation_config.json").exists():
        made = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        transformers.GenerationConfig.from_model_config(made).save_pretrained(directory)
    (directory / "README.md").write_text(card)
    ours, theirs = (read_tokenizer(path) for path in (directory, source))
    if (ours.get_vocab(), ours.chat_template) != (theirs.get_vocab(), theirs.chat_template):
        raise UserError(f"the export's tokenizer is not that of {source}: a file that it needs is none of {COPIED}")
    if config.dialogue.chat_template is not None:  # the model was trained with this one
        shutil.copyfile(config.dialogue.chat_template, directory / "chat_template.jinja")


def _compare(
    directory: Path, probe: Sequence[Sequence[int]], actor: Sequence[Tensor], config: Config
) -> tuple[float, float]:
    """Compares the actor's log-probabilities with those of the export as transformers reads it, see `agreement`.

    A model that was trained with longrope's long factors is compared with these, although transformers would take the
    short ones for probes of this length.
    """
    dtype, temperature = precision_of(config).dtype, config.rollout.temperature
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # torchrun's default is one, and the other ranks only wait
    hf = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if architecture_of(directory).rope.regime(config.rollout.max_model_len) == "long":
        hf.rope_parameters["short_factor"] = hf.rope_parameters["long_factor"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=hf, dtype=dtype, local_files_only=True, use_safetensors=True
    ).eval()
    read = _logprobs(model, probe, temperature)
    exact = read if dtype is torch.float32 else _logprobs(model.float(), probe, temperature)
    return agreement(torch.cat(list(actor)), exact, read)


def agreement(actor: Tensor, exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """The largest difference between the actor's log-probabilities and the export's, and how much rounding explains.

    In fp32 the two differ only by the order of summation: TOLERANCE. Below fp32 the actor's rounding error is larger,
    and grows with depth and with the size of the logits, so its limit is measured: transformers runs the same weights
    in the actor's dtype and in fp32, and the actor may be MOST_NOISE times as far from fp32 at its worst token, and
    MEAN_NOISE times on average. (With random models of 4 to 24 layers on a CPU it is equally far to within 7 %, while a
    wrong rotary base, or one layer's gate and up projections swapped, are many times as far.)

    Args:
        actor: [tokens] float32, by the actor.
        exact: [tokens] float32, by transformers in fp32.
        rounded: [tokens] float32, by transformers in the actor's dtype.

    Raises:
        UserError: beyond tolerance; names the worst token.
    """
    gaps, noise = (exact - actor).abs(), (exact - rounded).abs()
    most, mean = max(TOLERANCE, MOST_NOISE * float(noise.max())), max(TOLERANCE, MEAN_NOISE * float(noise.mean()))
    worst = int(gaps.argmax())  # NaN counts as the largest
    if not (gaps[worst] <= most and gaps.mean() <= mean):
        raise UserError(
            f"the export is not the model that was trained: transformers and the actor differ by {gaps[worst]:.2g} in "
            f"the log-probability of a token ({exact[worst]:.4f} and {actor[worst]:.4f}) and by {gaps.mean():.2g} "
            f"on average of {len(gaps)}; rounding explains at most {most:.2g} and {mean:.2g}"
        )
    return float(gaps[worst]), most


@torch.no_grad()
def _logprobs(model: Any, sequences: Sequence[Sequence[int]], temperature: float) -> Tensor:
    """[sum of (length - 1)] float32: every token but each sequence's first, as from `Policy.score`."""
    logprobs = []
    for ids in sequences:
        watchdog.alive()
        tokens = torch.tensor([list(ids)])
        logits = model(input_ids=tokens).logits[0, :-1].float() / temperature
        logprobs.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(logprobs)


def cannot_write(out: Path, error: Exception) -> UserError:
    """What to say if a disk is full, or cannot be written to."""
    return UserError(f"cannot write {out} ({error}); free some space or name another run.dir, then export again")


def replace(out: Path, new: Path) -> None:
    """Replaces `out` by `new`; if killed half-way, the old one is still there as `<out>.replaced`."""
    old = out.with_name(f"{out.name}.replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
