"""Multi-level RoIAlign in standard operators: gather the rows a RoI touches, contract them in y, then in x.

Bilinear sampling is separable, and so is torchvision's border rule, so a RoI of P x P bins with S x S samples
each needs the 2PS x 2PS grid of its taps and two weighted sums over it. All pyramid levels lie in one table of
channels-last rows, so that each RoI reads from its own level without any data-dependent shape.

With a sampling ratio of 0 (Detectron2's default) a cell is sampled once for each pixel that it spans on its feature
map, so that a large RoI needs more samples than a small one. A graph of fixed shapes cannot do that; it takes 2 samples
per axis (`fix_sampling`). `norton_deploy.parity.sampling_effect` measures what that changes.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.poolers import MultiScaleRoIAlign, _setup_scales

from norton_deploy.errors import UserError
from norton_deploy.models.detectron2_layers import PyramidRoIAlign

GATHER_CHUNK = 256
"""RoIs gathered at once; 784 rows of 256 fp32 channels each, 1000 RoIs in one piece would take 800 MB."""
EXPORTED_SAMPLES = 2


class StaticRoIAlign(nn.Module):
    """torchvision's `MultiScaleRoIAlign`, or `PyramidRoIAlign` with its alignment, for fixed feature sizes.

    Output rows are channels-last: [B * R, P_h, P_w, C].
    """

    level_start: Tensor
    level_height: Tensor
    level_width: Tensor
    level_scale: Tensor

    def __init__(
        self,
        pooler: MultiScaleRoIAlign,
        feature_sizes: dict[str, tuple[int, int]],
        image_size: tuple[int, int],
        *,
        chunk: int = GATHER_CHUNK,
    ) -> None:
        """
        Args:
            pooler: supplies levels, output size, sampling ratio and canonical scale and level.
            feature_sizes: (height, width) of every feature map, by name, in the backbone's order.
            image_size: (height, width) of the unpadded image; torchvision derives the scales from it,
                unless the pooler has them.
            chunk: how many RoIs are gathered at once.

        Raises:
            UserError: the sampling ratio is adaptive, or a level is missing.
        """
        super().__init__()
        if pooler.sampling_ratio <= 0:
            raise UserError(
                "RoI pooling: the sampling ratio is adaptive (<= 0), its number of samples depends on the box; "
                "fix it (fix_sampling), torchvision's default is 2"
            )
        self.levels = [name for name in feature_sizes if name in pooler.featmap_names]
        if not self.levels:
            raise UserError(f"RoI pooling: no feature map is named {pooler.featmap_names}")
        self.output_size = (int(pooler.output_size[0]), int(pooler.output_size[1]))
        self.samples = int(pooler.sampling_ratio)
        self.chunk = chunk
        sizes = [feature_sizes[name] for name in self.levels]
        self.aligned = isinstance(pooler, PyramidRoIAlign) and pooler.aligned
        if pooler.scales is not None:
            scales, mapper = pooler.scales, pooler.map_levels
        else:
            empty = [torch.empty(1, 1, *size) for size in sizes]
            scales, mapper = _setup_scales(empty, [image_size], pooler.canonical_scale, pooler.canonical_level)
        # level >= k where floor(lvl0 + log2(side / s0) + eps) >= k: one comparison per threshold, exact at
        # the thresholds, where log2 and floor would depend on the engine's log2.
        self.thresholds = [
            float(mapper.s0 * 2.0 ** (k - mapper.lvl0 - mapper.eps)) for k in range(mapper.k_min + 1, mapper.k_max + 1)
        ]
        starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
        self.register_buffer("level_start", torch.tensor(starts), persistent=False)
        self.register_buffer("level_height", torch.tensor([float(h) for h, _ in sizes]), persistent=False)
        self.register_buffer("level_width", torch.tensor([float(w) for _, w in sizes]), persistent=False)
        self.register_buffer("level_scale", torch.tensor([float(s) for s in scales]), persistent=False)

    def forward(self, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """
        Args:
            features: name -> [B, C, H, W].
            boxes: float32 [B, R, 4] xyxy in pixels of the image.

        Returns:
            [B * R, P_h, P_w, C] in the features' type.
        """
        batch, rois = boxes.shape[:2]
        rows = torch.cat([features[name].flatten(2).transpose(1, 2) for name in self.levels], dim=1)
        table_rows, channels = rows.shape[1:]
        table = rows.reshape(batch * table_rows, channels)

        level = self.level_of(boxes).reshape(-1)
        scale = self.level_scale.index_select(0, level)
        height, width = self.level_height.index_select(0, level), self.level_width.index_select(0, level)
        x1, y1, x2, y2 = (boxes.reshape(-1, 4) * scale[:, None]).unbind(-1)
        y_taps, y_weights = self.taps(y1, y2, height, self.output_size[0])
        x_taps, x_weights = self.taps(x1, x2, width, self.output_size[1])
        start = self.level_start.index_select(0, level)
        if batch > 1:
            start = start + torch.arange(batch, device=boxes.device).repeat_interleave(rois) * table_rows
        y_rows = start[:, None] + y_taps * width.to(torch.int64)[:, None]
        y_weights, x_weights = y_weights.to(table.dtype), x_weights.to(table.dtype)
        pooled = [
            self.pool(table, *(part[begin : begin + self.chunk] for part in (y_rows, x_taps, y_weights, x_weights)))
            for begin in range(0, batch * rois, self.chunk)
        ]
        return torch.cat(pooled) if len(pooled) > 1 else pooled[0]

    def pool(self, table: Tensor, y_rows: Tensor, x_taps: Tensor, y_weights: Tensor, x_weights: Tensor) -> Tensor:
        """Gather the taps [r, T_y, T_x, C] of some RoIs and contract them to [r, P_h, P_w, C]."""
        rois, channels = len(y_rows), table.shape[1]
        bins_y, bins_x = self.output_size
        taps = 2 * self.samples
        index = y_rows[:, :, None] + x_taps[:, None, :]
        grid = table.index_select(0, index.reshape(-1))
        by_row = grid.reshape(rois * bins_y, taps, bins_x * taps * channels)
        in_y = torch.bmm(y_weights.reshape(rois * bins_y, 1, taps), by_row)
        by_column = in_y.reshape(rois * bins_y, bins_x, taps, channels)
        weights = x_weights.reshape(rois, 1, bins_x, 1, taps).expand(rois, bins_y, bins_x, 1, taps)
        in_x = weights.reshape(rois * bins_y, bins_x, 1, taps) @ by_column
        return in_x.reshape(rois, bins_y, bins_x, channels)

    def level_of(self, boxes: Tensor) -> Tensor:
        """Index of the pyramid level of each box [..., 4], by the square root of its area; int64 [...]."""
        x1, y1, x2, y2 = boxes.unbind(-1)
        side = torch.sqrt((x2 - x1) * (y2 - y1))
        level = torch.zeros_like(side)
        for threshold in self.thresholds:
            level = level + (side >= threshold).to(side.dtype)
        return level.to(torch.int64)

    def taps(self, low: Tensor, high: Tensor, size: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        """Rows (or columns) that the samples of each RoI touch on its feature map, and their weights.

        Args:
            low, high: [N], the RoI's edges in pixels of its feature map.
            size: [N], height (or width) of that map.
            bins: output bins along this axis.

        Returns:
            taps int64 [N, bins * S * 2] in 0..size-1, weights float32 of the same shape. The mean over the
            bin's S samples is in the weights; samples farther than 1 pixel outside the map weigh 0.
        """
        samples = self.samples
        sample = torch.arange(bins * samples, device=low.device)
        bin_index = torch.div(sample, samples, rounding_mode="floor").to(low.dtype)
        within = (sample % samples).to(low.dtype) + 0.5
        if self.aligned:
            low, high = low - 0.5, high - 0.5
        extent = high - low if self.aligned else (high - low).clamp(min=1.0)
        bin_size = (extent / bins)[:, None]
        # In torchvision's order of operations, so that positions round alike.
        position = low[:, None] + bin_index * bin_size + within * bin_size / samples
        last = size[:, None] - 1
        inside = ((position >= -1) & (position <= size[:, None])).to(low.dtype) / samples
        position = torch.minimum(position.clamp(min=0), last)
        floor = position.floor()
        fraction = position - floor
        taps = torch.stack([floor, torch.minimum(floor + 1, last)], dim=-1)
        weights = torch.stack([inside * (1 - fraction), inside * fraction], dim=-1)
        return taps.flatten(1).to(torch.int64), weights.flatten(1)


def is_adaptive(model: GeneralizedRCNN) -> bool:
    """Whether any RoI pooling of a detector takes a number of samples that depends on the box."""
    return any(pooler.sampling_ratio <= 0 for pooler in _poolers(model))


def fix_sampling(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """A copy of a detector whose adaptive RoI poolings take `EXPORTED_SAMPLES` samples per cell and axis."""
    fixed = copy.deepcopy(model)
    for pooler in _poolers(fixed):
        if pooler.sampling_ratio <= 0:
            pooler.sampling_ratio = EXPORTED_SAMPLES
    return fixed


def _poolers(model: GeneralizedRCNN) -> list[MultiScaleRoIAlign]:
    return [layer for layer in model.modules() if isinstance(layer, MultiScaleRoIAlign)]
