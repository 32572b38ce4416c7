"""One thread (shared cores), no network, quiet libraries."""

import os
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def _import_torch() -> float:
    """Import torch and return the CPU time that it took: the unit of what tests may cost."""
    started = time.process_time()
    import torch  # noqa: F401

    return time.process_time() - started


IMPORT_TORCH_SECONDS = _import_torch()
