"""vLLM's worker on a CPU: what its ranks share is this engine's alone, and it can record to which experts tokens go."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY = Path("/dev/shm")


class PrivateWorker(CPUWorker):
    """Names the ranks' shared memory after this run, and removes the name as soon as all have opened it.

    vLLM names it after nothing but the ranks, so runs on one host would open or remove each other's. Memory without a
    name is freed with the last process that has it, however that ends.
    """

    def init_device(self) -> None:
        """Connects the ranks, all of which call this."""
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        self.distributed_init_method += f":{name[0]}"  # vLLM names the memory after what follows the last colon
        super().init_device()
        dist.barrier()  # the name is that of all engines, and another's ranks may not have opened theirs yet
        for file in SHARED_MEMORY.glob(f"*{name[0]}*"):
            file.unlink(missing_ok=True)


class RecordingWorker(PrivateWorker):
    """Records to which experts tokens go; see recording.py."""

    def init_device(self) -> None:
        """Connects the ranks."""
        super().init_device()
        self.model_runner = RecordingRunner(self.vllm_config, self.device)


class RecordingRunner(CPUModelRunner):
    """Does on a CPU what vLLM's other model runner, which needs Triton, does to record."""

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Makes the recorder, too."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._recorder = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """A forward pass."""
        self._recorder.begin_step(scheduler_output.aux_output_connector_metadata)
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Samples after a forward pass, and adds to what it returns the experts of that pass."""
        recorded = self.recorded()
        return with_experts(super().sample_tokens(grammar_output), recorded)

    def recorded(self) -> Any:
        """What is recorded of the forward pass that has just run."""
        batch, count = self.input_batch, self.input_batch.num_reqs
        step = SimpleNamespace(
            req_ids=batch.req_ids,
            query_start_loc_np=self.query_start_loc.np[: count + 1].copy(),
            num_computed_tokens_np=batch.num_computed_tokens_cpu[:count].copy(),
        )
        return self._recorder.prepare_output(step)


def with_experts(output: Any, recorded: Any) -> Any:
    """A runner's output, with the experts that were recorded of its pass."""
    places = output.req_id_to_index
    sampled = np.array([len(output.sampled_token_ids[places[name]]) for name in recorded.request_ids])
    recorded.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
    output.aux_output_connector_output = recorded.process_output()
    return output
