"""Anchors on a pyramid of fixed strides, rounded or not, with an offset."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class PyramidAnchorGenerator(AnchorGenerator):
    """torchvision's `AnchorGenerator`, but the strides are given instead of derived from the image's size.

    The two differ where a feature map's size was rounded up: the last level of an 800 x 800 image has 13 cells,
    so that torchvision places its anchors 800 // 13 = 61 pixels apart, and not 64.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        strides: tuple[int, ...],
        *,
        rounding: bool = True,
        offset: float = 0.0,
    ) -> None:
        """
        Args:
            sizes: anchor sides in pixels, per level.
            aspect_ratios: height over width, per level.
            strides: pixels between neighbouring cells, per level.
            rounding: whether anchors have whole pixels, as torchvision's.
            offset: centre of the first anchor, in strides from the image's corner.
        """
        self.rounding = rounding
        self.strides = strides
        self.offset = offset
        super().__init__(sizes, aspect_ratios)

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        """Anchors centred on the origin, [ratios * sizes, 4] xyxy, ratio by ratio."""
        if self.rounding:
            return super().generate_anchors(scales, aspect_ratios, dtype, device)
        side = torch.tensor(scales, dtype=torch.float64)
        height = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()
        widths = (side[None, :] / height[:, None]).flatten()
        heights = (side[None, :] * height[:, None]).flatten()
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).to(dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels, [A, 4] xyxy in pixels, once for each image of the batch."""
        dtype, device = feature_maps[0].dtype, feature_maps[0].device
        self.set_cell_anchors(dtype, device)
        levels = []
        for feature_map, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            height, width = feature_map.shape[-2:]
            y = (torch.arange(height, dtype=dtype, device=device) + self.offset) * stride
            x = (torch.arange(width, dtype=dtype, device=device) + self.offset) * stride
            centre_y, centre_x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([centre_x, centre_y, centre_x, centre_y], dim=-1)
            levels.append((centres[:, :, None, :] + cell).reshape(-1, 4))
        anchors = torch.cat(levels)
        return [anchors] * len(image_list.image_sizes)
