"""For all tests."""

import torch

torch.set_num_threads(1)  # the matrices are small: a second thread would only wait
