"""RoIAlign over a pyramid of fixed strides, with or without the half-pixel alignment."""

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper, _convert_to_roi_format, _filter_input


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's `MultiScaleRoIAlign`, but strides are given and the sampling may be aligned.

    torchvision infers the scales from the first batch's image sizes and samples without alignment: half a cell
    to the right and below. Levels are chosen by eq. 1 of the FPN paper without torchvision's 1e-6.
    """

    scales: list[float]
    map_levels: LevelMapper

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int,
        sampling_ratio: int,
        strides: tuple[int, ...],
        *,
        aligned: bool,
        canonical_scale: int = 224,
    ) -> None:
        """
        Args:
            featmap_names: names of the pyramid levels, finest first.
            output_size: cells per axis.
            sampling_ratio: samples per cell and axis; 0: as many as the cell has pixels, rounded up.
            strides: pixels per cell of each level; every level has twice that of the one before.
            aligned: sample at true pixel centres.
            canonical_scale: side in pixels of a RoI that is pooled from stride 16.
        """
        super().__init__(featmap_names, output_size, sampling_ratio, canonical_scale=canonical_scale)
        self.aligned = aligned
        self.scales = [1.0 / stride for stride in strides]
        finest, coarsest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        self.map_levels = LevelMapper(finest, coarsest, canonical_scale, self.canonical_level, eps=0.0)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            x: name -> features [B, C, H, W].
            boxes: per image [R, 4] xyxy in pixels.
            image_shapes: not used; torchvision's signature.

        Returns:
            [sum of R, C, output_size, output_size].
        """
        maps = _filter_input(x, self.featmap_names)
        rois = _convert_to_roi_format(boxes)
        levels = self.map_levels(boxes)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            chosen = torch.where(levels == level)[0]
            cells = roi_align(
                features, rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=self.aligned
            )
            # under autocast the levels' types may differ
            pooled[chosen] = cells.to(pooled.dtype)
        return pooled
