"""The export of real policies: the same bits from any layout, reloadable, and never half-written.

The launches run this file: `python test_export.py one HOME`, `torchrun ... test_export.py four HOME`.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from byte_level import CHAT, trained
from processes import run_script
from refusals import refusal
from safetensors.torch import load_file

from nemo_r3 import export as exporting
from nemo_r3 import runtime
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.model_card import model_card
from nemo_r3.runtime import World

KINDS = ("llama", "qwen2")
OWN_CHAT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 256, "initializer_range": 0.15, "eos_token_id": 0},
}
OUTDATED = {"torch_dtype": "float16", "auto_map": {"AutoModel": "modeling.Own"}}
VOCAB = 307  # more than the tokenizer has, and not a multiple of 2
PROBE = [[(7 * row + 11 * place) % VOCAB for place in range(length)] for row, length in enumerate((40, 2, 17))]


def make_models(home: Path) -> None:
    """A tied Llama and an untied Qwen2, with a byte-level tokenizer."""
    tokenizer = trained(["what went wrong? try again"] * 5, 300, ["<|end|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT
    shapes = (transformers.LlamaConfig, transformers.Qwen2Config)
    for seed, (kind, shape) in enumerate(zip(KINDS, shapes, strict=True)):
        torch.manual_seed(seed)
        config = shape(vocab_size=VOCAB, num_hidden_layers=4, tie_word_embeddings=kind == "llama", **SIZES)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(home / kind)
        fast.save_pretrained(home / kind)
    config = json.loads((home / "llama" / "config.json").read_text())
    (home / "llama" / "config.json").write_text(json.dumps(config | OUTDATED))
    (home / "llama" / "LICENSE.txt").write_text("be nice")
    (home / "llama" / "LICENSES").mkdir()
    (home / "llama" / "training_args.bin").write_bytes(b"a pickle")
    (home / "qwen2" / "generation_config.json").unlink()


def make_long_model(home: Path) -> None:
    """A Phi-3 whose long factors turn otherwise than its short ones, which the probes are short enough for."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5**p for p in range(8)]}
    own = {"original_max_position_embeddings": 64, "rope_scaling": rope, "bos_token_id": 0, "pad_token_id": None}
    config = transformers.Phi3Config(vocab_size=VOCAB, num_hidden_layers=2, **SIZES, **own)
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(home / "long")
    transformers.AutoTokenizer.from_pretrained(home / "llama").save_pretrained(home / "long")


# what the launches do


class Lab:
    def __init__(self, home: Path, **layout: int) -> None:
        self.home, self.layout = home, layout
        self.world: World | None = None
        self.findings: dict[str, Any] = {}

    def policy(self, kind: str, precision: str = "fp32") -> Any:
        from megatron.core import parallel_state

        from nemo_r3.actor.policy import Policy

        config = Config()
        config.model.path = str(self.home / kind)
        config.algo.kl_beta = 0.0
        config.actor.precision = precision
        config.rollout.temperature = 0.7
        for name, ways in self.layout.items():
            setattr(config.actor, name, ways)
        if self.world is None:
            self.world = runtime.start(config)
        else:
            parallel_state.destroy_model_parallel()
        return Policy(config, self.world)

    def export(self, name: str, policy: Any, card: str = "a card") -> float:
        source = Path(policy.config.model.path)
        difference, explained = exporting.export(policy, source, self.home / "out" / name, card, PROBE)
        assert difference <= explained
        return difference

    def refused(self, name: str, what: str, policy: Any) -> None:
        self.findings[what] = refusal(lambda: self.export(name, policy, "not written"))

    def report(self) -> None:
        assert self.world is not None
        every = self.world.gather(self.findings)
        if self.world.is_main:
            (self.home / f"ranks-{self.world.size}.json").write_text(json.dumps(every))


class Broken:
    """A policy whose stream of weights has one wrong number."""

    def __init__(self, policy: Any, wrong: float) -> None:
        self.policy, self.wrong = policy, wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def export_hf(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.policy.export_hf():
            if name == "model.layers.1.mlp.up_proj.weight":
                tensor = tensor.clone()
                tensor[3, 5] += self.wrong
            yield name, tensor


def one(home: Path) -> None:
    make_models(home)
    lab = Lab(home)
    policy = lab.policy("llama", "bf16")
    (home / "own.jinja").write_text(OWN_CHAT)
    policy.config.dialogue.chat_template = str(home / "own.jinja")
    lab.findings["bf16"] = lab.export("bf16", policy)
    lab.refused("bf16", "wrong in bf16", Broken(policy, 5.0))
    policy = lab.policy("llama")
    lab.findings["llama"] = lab.export("llama", policy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "out" / "llama")
    lab.findings["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    (home / "out" / "llama.writing").mkdir()  # as a killed export leaves it
    (home / "out" / "llama.writing" / "part-7.safetensors").write_text("half")
    lab.findings["again"] = lab.export("llama", policy, "a second card")
    lab.refused("llama", "wrong", Broken(policy, 0.1))
    lab.refused("llama", "nan", Broken(policy, float("nan")))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writes fail as they do on a full disk
    lab.refused("llama", "full", policy)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (home / "file").write_text("")
    lab.refused("../file/llama", "nowhere", policy)
    exporting.SHARD_BYTES = 200_000
    policy = lab.policy("qwen2")
    (home / "disk" / "qwen2").mkdir(parents=True)
    (home / "out" / "qwen2").symlink_to(home / "disk" / "qwen2")
    lab.findings["qwen2"] = lab.export("qwen2", policy)
    (home / "qwen2" / "tokenizer.json").write_text("{")
    lab.refused("no_tokenizer", "no tokenizer", policy)
    make_long_model(home)
    lab.findings["long"] = lab.export("long", lab.policy("long"))
    lab.report()


def four(home: Path) -> None:
    lab = Lab(home, tensor_parallel=2, pipeline_parallel=2)
    policy = lab.policy("llama")
    lab.findings["llama"] = lab.export("llama-four", policy)
    lab.refused("llama-four", "wrong", Broken(policy, 0.1))
    exporting.SHARD_BYTES = 200_000
    lab.findings["qwen2"] = lab.export("qwen2-four", lab.policy("qwen2"))
    lab.report()


# the tests


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    run_script(Path(__file__), "one", place, TORCHDYNAMO_DISABLE="1")
    return place


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    (findings,) = json.loads((home / "ranks-1.json").read_text())
    return findings


@pytest.fixture(scope="module")
def found_by_four(found: dict[str, Any], home: Path) -> list[dict[str, Any]]:
    tokenizer = (home / "llama" / "tokenizer.json").read_text()  # `one` has broken it
    (home / "qwen2" / "tokenizer.json").write_text(tokenizer)
    run_script(Path(__file__), "four", home, ranks=4, TORCHDYNAMO_DISABLE="1")
    return json.loads((home / "ranks-4.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_exports_what_it_loaded(home: Path, found: dict[str, Any], kind: str) -> None:
    assert found[kind] <= 2e-5
    assert_same_bits(weights(home / "out" / kind), weights(home / kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_export_the_same(home: Path, found_by_four: list[dict[str, Any]], kind: str) -> None:
    assert len({findings[kind] for findings in found_by_four}) == 1
    assert found_by_four[0][kind] <= 2e-5
    assert_same_bits(weights(home / "out" / f"{kind}-four"), weights(home / kind))


def test_bf16(home: Path, found: dict[str, Any]) -> None:
    assert 1e-4 < found["bf16"] < 0.5
    assert "not the model that was trained" in found["wrong in bf16"]
    expected = {name: tensor.bfloat16() for name, tensor in weights(home / "llama").items()}
    assert_same_bits(weights(home / "out" / "bf16"), expected)
    assert json.loads((home / "out" / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("off", "said"),
    [
        ([0.03, 0.01, 0.01, 0.01], "accepted"),
        (
            [0.05, 0.0, 0.0, 0.0],
            "by 0.05 in the log-probability of a token (-1.0000 and -0.9500) and by 0.013 on avera",
        ),
        ([0.025, 0.025, -0.025, 0.025], "and by 0.025 on average of 4; rounding explains at most 0.04 and 0.02"),
        ([0.0, math.nan, 0.0, 0.0], "differ by nan"),
    ],
    ids=["as rounded", "at one token", "at all", "nan"],
)
def test_an_actor_may_be_a_few_times_as_far_off_as_rounding(off: list[float], said: str) -> None:
    exact, noise = torch.full((4,), -1.0), torch.tensor([0.01, -0.01, 0.01, -0.01])
    assert said in refusal(lambda: exporting.agreement(exact + torch.tensor(off), exact, exact + noise))
    assert exporting.agreement(exact, exact, exact) == (0.0, 1e-4)


def test_longropes_long_factors_are_compared_with_themselves(found: dict[str, Any]) -> None:
    assert found["long"] < 1e-4


def test_files(home: Path, found: dict[str, Any]) -> None:
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    both = tokenizer | {"config.json", "generation_config.json", "README.md"}
    llama = {file.name for file in (home / "out" / "llama").iterdir()}
    qwen2 = {file.name for file in (home / "out" / "qwen2").iterdir()}
    assert llama == both | {"model.safetensors", "LICENSE.txt"}
    assert len({file.stat().st_mode for file in (home / "out" / "llama").iterdir()}) == 1
    shards = {name for name in qwen2 if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert qwen2 == both | shards | {"model.safetensors.index.json"}
    index = json.loads((home / "out" / "qwen2" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(home / "out" / "qwen2" / shard).values()) <= 200_000
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(home / "qwen2").values())
    for kind in KINDS:
        old, new = (json.loads((place / kind / "config.json").read_text()) for place in (home, home / "out"))
        assert new == {key: old[key] for key in old.keys() - OUTDATED.keys()} | {"dtype": "float32"}


def test_the_models_chat_template_or_what_replaced_it_goes_along(home: Path, found: dict[str, Any]) -> None:
    assert found["chat"] == "<|user|>hi<|end|>"
    assert (home / "out" / "bf16" / "chat_template.jinja").read_text() == OWN_CHAT


def test_no_rank_runs_ahead_of_the_one_that_writes() -> None:
    """Ahead, it would wait for all files in one collective, whose time limit is meant for one."""
    done: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("one", "two"):
            done.append(name)
            yield name, torch.zeros(1)

    world = SimpleNamespace(is_main=False, barrier=lambda: done.append("met"), on_main=lambda act: (0.0, 0.0))
    policy: Any = SimpleNamespace(world=world, score=lambda probe: [], export_hf=weights, config=Config())
    exporting.export(policy, Path("source"), Path("out"), "a card", PROBE)
    assert done == ["one", "met", "two", "met"]


def test_a_second_export_replaces_the_first(home: Path, found: dict[str, Any]) -> None:
    assert found["again"] == found["llama"]
    assert (home / "out" / "llama" / "README.md").read_text() == "a second card"


def test_if_it_is_cut_short_the_first_export_is_still_there(tmp_path: Path) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / "README.md").write_text("a card")
    with pytest.raises(FileNotFoundError):
        exporting.replace(out, tmp_path / "gone")
    assert (tmp_path / "export.replaced" / "README.md").read_text() == "a card"


def test_an_export_goes_where_its_directory_links_to(home: Path, found: dict[str, Any]) -> None:
    assert (home / "out" / "qwen2").is_symlink()
    assert (home / "disk" / "qwen2" / "config.json").exists() and len(list((home / "disk").iterdir())) == 1


def test_a_place_of_something_else_is_refused(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "export", tmp_path / "models"
    elsewhere.mkdir()
    out.symlink_to(elsewhere)
    exporting.refuse_other_contents(out)
    card = elsewhere / "README.md"
    card.write_text(model_card(Config(), {}, 1, "tiny", "serve it"))
    exporting.refuse_other_contents(out)
    card.write_bytes(b"all my \xff models")
    for place, said in ((out, f"{out} links to {elsewhere}, which"), (elsewhere, elsewhere), (card, card)):
        with pytest.raises(UserError, match=f"^{said} holds something else than an export"):
            exporting.refuse_other_contents(place)


def test_two_exports_to_one_directory_are_refused(tmp_path: Path) -> None:
    out, adapter = tmp_path / "export", tmp_path / "adapter"
    exporting.refuse_other_contents(out, adapter)
    adapter.symlink_to(out)
    for place in (out, adapter):
        exporting.refuse_other_contents(place)
    with pytest.raises(UserError, match=f"^{out} and {adapter} are one directory, {out.resolve()}, where each"):
        exporting.refuse_other_contents(out, adapter)


def test_a_wrong_weight_is_refused(home: Path, found: dict[str, Any]) -> None:
    assert "not the model that was trained" in found["wrong"]
    assert "differ by" in found["wrong"]
    assert "differ by nan" in found["nan"]
    assert_same_bits(weights(home / "out" / "llama"), weights(home / "llama"))


@pytest.mark.slow
def test_a_wrong_weight_is_refused_on_every_rank(home: Path, found_by_four: list[dict[str, Any]]) -> None:
    (message,) = {findings["wrong"] for findings in found_by_four}
    assert "not the model that was trained" in message
    assert (home / "out" / "llama-four" / "README.md").read_text() == "a card"


def test_what_cannot_be_written_or_read(found: dict[str, Any]) -> None:
    assert "cannot write" in found["full"]
    assert "cannot write" in found["nowhere"]
    assert "tokenizer" in found["no tokenizer"]
    assert not any("\n" in str(message) for message in found.values())


@pytest.mark.slow
def test_nothing_half_written(home: Path, found_by_four: list[dict[str, Any]]) -> None:
    found = {path.name for path in (home / "out").iterdir()}
    assert found == {"bf16", "llama", "llama-four", "long", "qwen2", "qwen2-four"}


if __name__ == "__main__":
    {"one": one, "four": four}[sys.argv[1]](Path(sys.argv[2]))
