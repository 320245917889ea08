"""Memory of a training run: estimates, plans that fit a GPU, and GPU readings.

sizes: a model's sizes from its config.json; estimate: bytes of each part; plan: MemoryPlan; suggest: flags for GPUs of
common sizes; tables: output; checkup: `gpu_memory.py check`; devices: NVML; watch: `gpu_memory.py monitor`.
"""
