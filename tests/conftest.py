import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a library that reads it: no test reaches for the hub
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
