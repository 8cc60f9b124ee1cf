"""Runs real policies at several layouts in one launch and stores what they found; the tests assert on it.

    python probe.py one HOME            makes the models and what the others are compared with; kills itself at the end
    torchrun ... probe.py two HOME      TP2, PP2, EP2 and DP2, one after the other; ends in a full disk on one rank
    torchrun ... probe.py four HOME     TP2xPP2, TP2xDP2, PP2xEP2 and TP2xEP2; sequence parallel with TP2
    torchrun ... probe.py eight HOME    TP2xPP2xDP2, TP2xPP4, PP4xDP2 and DP8, where a rank has no row
    torchrun ... probe.py devices HOME  TP2 and PP2 on a GPU that is pretended
    python probe.py ceiling HOME        an update with a vocabulary of 150,000 under a memory limit

A launch costs seconds of imports, so it holds many policies; between layouts the parallel groups are rebuilt.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

from ceiling import ceiling
from damage import after_the_kill, bad_checkpoints, full_disk, killed_while_saving, limited, written_late_by_rank_1
from data import SPLIT, batch_of, make_models, plain_steps
from devices import devices
from families import TRIED, UNTRIED
from lab import Lab, save_at_work
from offloading import offloaded
from pretended_gpu import pretend
from rejection import rejection
from routed import plain_routed, routed
from shared import shared_and_separate

from nemo_r3 import entry


def families(lab: Lab, at: str) -> None:
    for layout, kind in UNTRIED:
        if layout == at:
            lab.family(layout, kind)


def one(lab: Lab) -> None:
    make_models(lab.home)
    for kind in TRIED["one"]:
        lab.trial("one", kind, save=True)
        lab.note(f"plain-{kind}", plain_steps(lab.home, kind))
    for kind in ("qwen2", "qwen3_moe"):
        lab.trial("one", kind, save=True, lora_rank=4)
        lab.trial("one", kind, lora_rank=4, recompute="full")
        lab.note(f"plain-{kind}-lora_rank=4", plain_steps(lab.home, kind, lora_rank=4))
    lab.note("plain-routed", plain_routed(lab.home))
    for actor in ({}, {"recompute": "selective"}, {"recompute": "full"}, {"shared_context": False}, {"lora_rank": 4}):
        routed(lab, "one", **actor)
    lab.trial("one", "llama_tied", shared_context=False)
    for actor in ({"recompute": "selective"}, {"recompute": "full"}):
        lab.trial("one", "qwen2", **actor)
    families(lab, "one")
    for kind in {kind for _, kind in UNTRIED}:
        lab.note(f"plain-family-{kind}", plain_steps(lab.home, kind, count=1))
    lab.note("plain-split-qwen2", plain_steps(lab.home, "qwen2", count=2, updates=SPLIT))
    lab.split("one", "qwen2")
    rejection(lab, "one", "qwen2")
    for rank in (0, 4):
        trainer = lab.trainer("one", "qwen2", kl_beta=0.0, lora_rank=rank)
        lab.note(f"without-kl-{rank}", {"metrics": trainer.update(batch_of()), "held": trainer.held()})
    shared_and_separate(lab, "one", "llama_tied")
    for recompute in ("selective", "full"):
        shared_and_separate(lab, "one", "qwen2", recompute=recompute)
    lab.note("offload-one", offloaded(lab, "one"))
    lab.resume("one", "one", "llama_tied")
    lab.resume("one", "one", "qwen2")
    lab.resume("one", "one", "qwen2", lora_rank=4)
    lab.fork("one", "qwen2")
    lab.note("bad_checkpoints", bad_checkpoints(lab))
    lab.note("full_disk", full_disk(lab))
    killed_while_saving(lab)


def two(lab: Lab) -> None:
    for kind in TRIED["tp2"]:
        lab.trial("tp2", kind, save=kind == "qwen2")
    families(lab, "tp2")
    lab.trial("tp2", "qwen2", save=True, lora_rank=4)
    lab.trial("tp2", "qwen3_moe", lora_rank=4)
    for layout, recompute in (("tp2", "none"), ("pp2", "full"), ("ep2", "none")):
        routed(lab, layout, recompute=recompute)
    routed(lab, "ep2", lora_rank=4)
    shared_and_separate(lab, "tp2", "qwen2")
    lab.resume("one", "tp2", "llama_tied")
    lab.fork("tp2", "llama_tied")
    lab.resume("tp2", "tp2", "qwen2")
    lab.note("killed", after_the_kill(lab))
    for kind in ("llama_tied", "qwen2", "qwen3_moe"):
        lab.trial("pp2", kind, save=kind != "qwen3_moe")
    lab.trial("pp2", "qwen2", lora_rank=4)
    shared_and_separate(lab, "pp2", "llama_tied")
    lab.resume("tp2", "pp2", "qwen2")
    lab.resume("pp2", "pp2", "llama_tied")
    lab.trial("ep2", "qwen3_moe", save=True)
    lab.resume("ep2", "ep2", "qwen3_moe")
    lab.resume("one", "ep2", "qwen3_moe")
    lab.trial("ep2", "qwen3_moe", save=True, lora_rank=4)
    lab.resume("one", "ep2", "qwen3_moe", lora_rank=4)
    lab.note("offload-ep2", offloaded(lab, "ep2", "qwen3_moe"))
    for kind in ("llama_tied", "qwen2", "qwen3_moe"):
        lab.trial("dp2", kind, save=kind != "qwen3_moe")
    lab.resume("ep2", "dp2", "qwen3_moe")
    lab.resume("ep2", "dp2", "qwen3_moe", lora_rank=4)
    lab.trial("dp2", "qwen2", shared_context=False)
    lab.trial("dp2", "qwen2", lora_rank=4)
    lab.split("dp2", "qwen2")
    rejection(lab, "dp2", "qwen2")
    lab.note("offload-dp2", offloaded(lab, "dp2"))
    lab.resume("pp2", "dp2", "llama_tied")
    lab.resume("dp2", "dp2", "qwen2")
    trainer = lab.trainer("dp2", "llama")
    lab.note("late", written_late_by_rank_1(lab, trainer))
    save_at_work(trainer, lab.home / "full-two", 1, {}, keep=1)
    trainer.update(batch_of())
    limit = 50_000 if lab.world.rank == 1 else resource.RLIM_INFINITY
    limited(limit, lambda: save_at_work(trainer, lab.home / "full-two", 2, {}, keep=1))


def four(lab: Lab) -> None:
    for kind in TRIED["tp2pp2"]:
        lab.trial("tp2pp2", kind, save=kind == "llama_tied")
    families(lab, "tp2pp2")
    shared_and_separate(lab, "tp2pp2", "llama_tied")
    lab.split("tp2pp2", "qwen2")
    lab.resume("dp2", "tp2pp2", "qwen2")
    lab.trial("tp2dp2", "qwen2")
    lab.trial("tp2pp2", "qwen2", lora_rank=4)
    lab.resume("tp2", "tp2pp2", "qwen2", lora_rank=4)
    lab.resume("tp2pp2", "tp2dp2", "llama_tied")
    for layout in ("pp2ep2", "tp2ep2"):
        routed(lab, layout)
        lab.trial(layout, "qwen3_moe")
        lab.trial(layout, "qwen3_moe", lora_rank=4)
    lab.resume("ep2", "tp2ep2", "qwen3_moe")


def eight(lab: Lab) -> None:
    for layout, kind in (("tp2pp2dp2", "qwen2"), ("tp2pp4", "llama"), ("pp4dp2", "llama_tied"), ("dp8", "qwen2")):
        lab.trial(layout, kind)


def probe(arguments: Sequence[str]) -> None:
    verb, home = arguments
    if verb == "devices":
        pretend()
    verbs = {"one": one, "two": two, "four": four, "eight": eight, "devices": devices, "ceiling": ceiling}
    verbs[verb](Lab(Path(home)))


if __name__ == "__main__":
    entry.main(probe)
