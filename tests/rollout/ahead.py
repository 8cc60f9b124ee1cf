"""A recording engine that is a step ahead of its results, as on a GPU; test_recording.py asserts on it.

python ahead.py DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from probed import schedule_ahead
from recorded import Probe

from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Completion, Sampling

STOPS = tuple(range(0, 131, 4))  # of 131 tokens: every fourth ends a turn


def process_when_taken(runner: Any) -> None:
    """Has the recorder see a step's result when vLLM takes it, as on a GPU; on a CPU it is there at once."""
    from vllm.v1.outputs import AsyncModelRunnerOutput
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from nemo_r3.rollout.cpu_worker import with_experts

    class Later(AsyncModelRunnerOutput):
        def __init__(self, output: Any, recorded: Any) -> None:
            self.output, self.recorded = output, recorded

        def get_output(self) -> Any:
            output = self.output.get_output() if isinstance(self.output, AsyncModelRunnerOutput) else self.output
            return with_experts(output, self.recorded)

    def sample_tokens(grammar_output: Any) -> Later:
        recorded = runner.recorded()
        return Later(CPUModelRunner.sample_tokens(runner, grammar_output), recorded)

    runner.sample_tokens = sample_tokens


def sample(probe: Probe, name: str, prompt: list[int]) -> Completion:
    probe.engine.add(name, prompt, Sampling(1.0, 40, STOPS, 4, 0))
    while True:
        for completion in probe.engine.step():
            return completion


def main(home: Path) -> dict[str, Any]:
    prepare = environment.prepare

    def prepare_ahead(*args: Any, **named: Any) -> None:
        prepare(*args, **named)
        schedule_ahead()

    environment.prepare = prepare_ahead
    probe, prompt = Probe(home), list(range(40, 90))
    core = probe.engine._llm.engine_core.engine_core
    process_when_taken(core.model_executor.driver_worker.worker.model_runner)
    first = sample(probe, "first", prompt)
    found = {"ended": first.finish_reason, "under way": len(core.batch_queue), "first": probe.differing(prompt, first)}
    probe.refit(home)
    return found | {"after a refit": probe.differing(prompt, sample(probe, "second", prompt))}


if __name__ == "__main__":
    home = Path(sys.argv[1])
    (home / "result.json").write_text(json.dumps(main(home)))
    os._exit(0)  # an engine that is shut down searches all objects of the process, several times
