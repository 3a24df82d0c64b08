"""Cross-modal distillation, a clean teacher to a poor-modality student, on top of structkd."""

import os

# Read by torch when it is imported, so before any module here does. By default OpenMP threads spin
# while they wait: on shared cores that made small networks train 25 times slower than threads that
# sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
