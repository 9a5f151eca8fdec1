"""How the suite runs: the same hypothesis examples everywhere, and one thread of torch's for each worker."""

import os

import torch
from hypothesis import settings

settings.register_profile("lrpfunc", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lrpfunc")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use all cores wait for one another most of the time.
    torch.set_num_threads(1)
