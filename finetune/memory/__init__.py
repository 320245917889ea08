"""Memory of a training run: estimates, plans that fit a GPU, and GPU readings.

sizes: a model's sizes from its config.json; estimate: bytes of each part; plan: MemoryPlan and suggested flags; tables:
output; checkup: `gpu_memory.py check`; devices: NVML; watch: `gpu_memory.py monitor`.
"""
