"""Tritter grows language models: expansion, protected continued training, checked lineage."""

import os

# Spinning OpenMP threads cost a factor of ten when cores are shared; the policy is read once,
# when torch is first imported, so it has to stand here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
