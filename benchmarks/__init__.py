"""What nemo_r3 costs, measured. A command each, whose results go to benchmarks/results/; `--small` tries it.

    update           the update with shared contexts, packed and padded rows          make bench
    step_vs_trl      a whole step against TRL's GRPOTrainer                           make bench
    update_vs_verl   the update against verl's FSDP workers                           make bench-verl
    gpu_check        kernels, update, rollout, refit and training on a GPU            make gpu-check
    emulated_fp8     training in emulated FP8 against float32, on a CPU

`workload.py` makes the model and the steps that all sides of a comparison are given, `sides.py` runs the sides in
turns, and each `*_worker.py` is a side.
"""
