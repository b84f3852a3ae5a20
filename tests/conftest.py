"""For all tests."""

import os

import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the matrices are small: a second thread would only wait
