"""Creates models with random weights on their devices, to check kernels or to measure speed without a checkpoint."""

import math
import zlib
from collections.abc import Sequence

import torch

from model.checkpoint.config import Towers, TwoTowerConfig
from model.network.two_tower import TwoTower


@torch.no_grad()
def random_pair(
    config: TwoTowerConfig,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    towers: Towers = "both",
    seed: int = 0,
) -> TwoTower:
    """Return a model with random weights, one stage on each device.

    The weights are scaled so that values keep their size from layer to layer. The numbers depend on the seed, the name
    of the weight and the type of device, not on the stages.
    """
    pair = TwoTower(config, dtype, devices, towers)
    generators = {device: torch.Generator(device) for device in set(devices)}
    for name, weight in pair.checkpoint_targets().items():
        generator = generators[weight.device].manual_seed(seed + zlib.crc32(name.encode()))
        last = name.rpartition(".")[2]
        if last == "A_log":
            weight.uniform_(0, math.log(16), generator=generator)
        elif last == "dt_bias":
            weight.uniform_(-6.9, -2.3, generator=generator)  # dt of 0.001 to 0.1 after softplus
        elif last in ("e_score_correction_bias", "bias"):
            weight.zero_()
        elif weight.dim() == 1:  # the norms and D
            weight.fill_(1.0)
        else:
            size = 0.02 if name.startswith("scale_shift_tables") else weight.shape[-1] ** -0.5
            weight.normal_(0, size, generator=generator)
    pair.share_time()
    return pair
