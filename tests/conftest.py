"""One thread for every test: the numbers do not depend on the machine, and cores may be shared."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

torch.set_num_threads(1)
