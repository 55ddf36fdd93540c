"""The paper's Tables I and IV, VGG-16-BN on CIFAR-10, as printed; Table III is in norton_deploy/reporting."""

from typing import NamedTuple

DENSE_TOP1 = 93.96
"""Top-1 (%) of the dense model of both tables."""


class Level(NamedTuple):
    """A row of Table I; CR is the reduction in percent."""

    macs_millions: float
    macs_cr: int
    params_millions: float
    top1: float


class Rank(NamedTuple):
    """A row of Table IV; top-1 as decomposed and fine-tuned."""

    macs_cr: float
    params_cr: float
    nmse: float
    top1_decomposed: float
    top1_fine_tuned: float


TABLE_I = {
    "vgg16_77": Level(74.14, 77, 3.60, 94.11),
    "vgg16_88": Level(37.68, 88, 1.94, 93.84),
    "vgg16_96": Level(13.54, 96, 0.24, 92.54),
    "vgg16_99": Level(4.58, 99, 0.14, 90.32),
}
"""By the plan of configs/plans that makes it."""
TABLE_IV = {
    1: Rank(88.03, 87.06, 0.6265, 10.00, 93.84),
    2: Rank(76.44, 75.98, 0.4114, 10.00, 94.11),
    3: Rank(64.85, 64.91, 0.2760, 68.37, 94.18),
    4: Rank(53.27, 53.84, 0.1837, 88.30, 94.07),
    5: Rank(41.69, 42.76, 0.1173, 92.44, 94.22),
    6: Rank(30.10, 31.69, 0.0698, 93.45, 94.15),
    7: Rank(18.51, 20.61, 0.0372, 93.90, 94.11),
    8: Rank(6.93, 9.54, 0.0137, 94.03, 94.03),
}
"""By rank."""
