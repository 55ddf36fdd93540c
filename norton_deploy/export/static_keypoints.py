"""The keypoint head on fixed shapes, with torchvision's decoding: the best pixel of a bicubically resized heatmap.

torchvision resizes each heatmap to the RoI's size in whole pixels (bicubic, a = -0.75) and takes the argmax:
a different shape for every RoI. The resize is linear and separable, so the same function can be evaluated at
any chosen pixels of that size as two products with cubic weights. Two steps find its maximum:

1. up to `coarse` (112) of the RoI's own pixels per axis; all of them when the RoI is no larger, and then the
   result is torchvision's by construction;
2. in a larger RoI, all true pixels around the `peaks` (16) best local maxima of step 1. Their window reaches
   past the neighbouring coarse samples.

In graphs for images of at most `WHOLE_SIDE` pixels step 1 takes all pixels of every RoI. In larger ones the result
differs from torchvision's where the true maximum lies at none of the 16 best coarse maxima, or where two pixels tie
to within rounding. That happens on the noisy heatmaps of a head that was hardly trained, which have many maxima.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from norton_deploy.errors import UserError
from norton_deploy.modeling.keypoint_predictor import NormalisedKeypointPredictor

CUBIC_A = -0.75
"""Coefficient of PyTorch's bicubic kernel."""
WHOLE_SIDE = 224
"""Largest image side in pixels up to which every pixel of every RoI is evaluated."""
BORDER = 2
"""Rows by which a heatmap is extended, so that the kernel's taps past the border repeat the edge."""
STEEP = 1.0e30
"""Factor that sends every pixel that is not a local maximum far below all that are."""
NOWHERE = -3.0e38
"""Below every heatmap value; finite, since an infinity times a zero weight would be NaN."""


class StaticKeypointHead(nn.Module):
    """Keypoint head and predictor, and the decoding of their heatmaps."""

    def __init__(self, roi_heads: RoIHeads, image_size: tuple[int, int], *, coarse: int = 112, peaks: int = 16) -> None:
        """
        Args:
            roi_heads: supplies the keypoint head and predictor.
            image_size: (height, width) in pixels; bounds the size of a RoI and so the step of `coarse`.
            coarse: pixels per axis at which each heatmap is first evaluated, in images larger than `WHOLE_SIDE`.
            peaks: local maxima of the coarse map that are searched pixel by pixel.

        Raises:
            UserError: the predictor is not torchvision's.
        """
        super().__init__()
        predictor = roi_heads.keypoint_predictor
        if not isinstance(predictor, KeypointRCNNPredictor):
            raise UserError(
                f"keypoint predictor: expected torchvision's KeypointRCNNPredictor, found {type(predictor).__name__}"
            )
        self.head = roi_heads.keypoint_head
        self.by_probability = isinstance(predictor, NormalisedKeypointPredictor)
        self.low_resolution = predictor.kps_score_lowres
        self.up_scale = float(predictor.up_scale)
        side = max(image_size)
        self.coarse = side if side <= WHOLE_SIDE else coarse
        self.peaks = peaks
        self.reach = -(-side // self.coarse)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled RoIs [N, P_h, P_w, C] -> heatmaps float32 [N, K, S, S]."""
        low = self.low_resolution(self.head(pooled.permute(0, 3, 1, 2))).to(torch.float32)
        heatmaps = F.interpolate(
            low,
            scale_factor=self.up_scale,
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=False,
        )
        if self.by_probability:
            heatmaps = heatmaps - heatmaps.flatten(2).logsumexp(dim=2)[:, :, None, None]
        return heatmaps

    def keypoints(self, heatmaps: Tensor, boxes: Tensor) -> Tensor:
        """Decode heatmaps, as torchvision's `heatmaps_to_keypoints`.

        Args:
            heatmaps: float32 [N, K, S, S].
            boxes: float32 [N, 4] xyxy in pixels.

        Returns:
            float32 [N, K, 3]: x, y in pixels and the heatmap's value there, or the probability that it stands for.
        """
        x1, y1, x2, y2 = boxes[:, None, :].unbind(-1)
        width, height = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
        columns, rows = torch.ceil(width), torch.ceil(height)
        x, y, score = self.best_pixel(heatmaps, columns, rows)
        x = (x + 0.5) * (width / columns) + x1
        y = (y + 0.5) * (height / rows) + y1
        return torch.stack([x, y, score.exp() if self.by_probability else score], dim=-1)

    def best_pixel(self, heatmaps: Tensor, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Argmax of each heatmap resized to [rows, columns].

        Args:
            heatmaps: float32 [N, K, S, S].
            columns, rows: [N, 1], whole numbers of pixels.

        Returns:
            x, y (whole pixels as floats) and the value there, each [N, K].
        """
        count, keypoints, size = heatmaps.shape[:3]
        extended = F.pad(heatmaps, (BORDER, BORDER, BORDER, BORDER), mode="replicate")

        x_coarse, x_outside = self.coarse_pixels(columns)
        y_coarse, y_outside = self.coarse_pixels(rows)
        x_weights = cubic_weights(x_coarse, columns, size)[:, None]
        y_weights = cubic_weights(y_coarse, rows, size)[:, None]
        # Sums with 0 or NOWHERE instead of selections: engines run them several times faster.
        coarse = y_weights @ extended @ x_weights.transpose(-1, -2)
        coarse = coarse + (y_outside[:, None, :, None] + x_outside[:, None, None, :]).clamp(min=NOWHERE)
        below = coarse - F.max_pool2d(coarse, kernel_size=3, stride=1, padding=1)
        peaks = (coarse + below * STEEP).flatten(2)
        index = peaks.topk(min(self.peaks, peaks.shape[-1]), dim=-1).indices
        y_peak = torch.div(index, self.coarse, rounding_mode="floor")
        x_peak = index - y_peak * self.coarse
        found = index.shape[-1]

        x_window, x_start, x_weights, x_outside = self.window(x_coarse, x_peak.reshape(count, -1), columns, size)
        y_window, y_start, y_weights, y_outside = self.window(y_coarse, y_peak.reshape(count, -1), rows, size)
        side, cell_count = x_weights.shape[-2:]
        windows = count * keypoints * found
        step = torch.arange(cell_count, device=x_start.device)
        width = size + 2 * BORDER
        owner = torch.arange(count * keypoints, device=x_start.device).repeat_interleave(found) * (width * width)
        row = owner[:, None] + (y_start.reshape(-1, 1) + step) * width
        patch_index = row[:, :, None] + (x_start.reshape(-1, 1) + step)[:, None, :]
        patches = extended.reshape(-1).index_select(0, patch_index.reshape(-1))
        patches = patches.reshape(windows, cell_count, cell_count)
        by_row = torch.bmm(y_weights.reshape(windows, side, cell_count), patches)
        fine = torch.bmm(by_row, x_weights.reshape(windows, side, cell_count).transpose(-1, -2))
        outside = y_outside.reshape(windows, side, 1) + x_outside.reshape(windows, 1, side)
        fine = (fine + outside.clamp(min=NOWHERE)).reshape(count, keypoints, found, side, side)
        x_window = x_window.reshape(count, keypoints, found, side)
        y_window = y_window.reshape(count, keypoints, found, side)

        score, best = fine.flatten(2).topk(1, dim=-1)
        peak = torch.div(best, side * side, rounding_mode="floor")
        within = best - peak * (side * side)
        row = torch.div(within, side, rounding_mode="floor")
        x = x_window.flatten(2).gather(2, peak * side + within - row * side)
        y = y_window.flatten(2).gather(2, peak * side + row)
        return x[..., 0], y[..., 0], score[..., 0]

    def coarse_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Whole pixels spread over each axis of `pixels` [N, 1]; [N, coarse], and 0 or NOWHERE where none is left."""
        sample = torch.arange(self.coarse, device=pixels.device, dtype=pixels.dtype)[None]
        spread = torch.floor((sample + 0.5) * pixels / self.coarse)
        chosen = torch.where(pixels <= self.coarse, sample + 0.0 * pixels, spread)
        return chosen, torch.where(chosen < pixels, 0.0, NOWHERE)

    def window(self, coarse: Tensor, peak: Tensor, pixels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The true pixels around coarse samples along one axis, and how they read the heatmap's cells near them.

        A window spans few cells: at `coarse` pixels or more, `reach` pixels are at most reach * size / coarse cells.
        In a smaller RoI, where the coarse samples are all pixels, the window is cut to as many cells.

        Args:
            coarse: [N, coarse] pixels.
            peak: [N, Q] index of each window's middle.
            pixels: [N, 1], size of the RoI.
            size: S, cells of the heatmap.

        Returns:
            pixels [N, Q, W], index of the first cell of the extended heatmap [N, Q], weights of T cells from there
            [N, Q, W, T], and 0 or NOWHERE for pixels that do not count [N, Q, W].
        """
        offsets = torch.arange(-self.reach, self.reach + 1, device=coarse.device, dtype=coarse.dtype)
        middle = coarse.gather(1, peak)
        window = middle[..., None] + offsets
        span = self.reach * size / self.coarse
        cell_count = min(int(2 * span) + 6, size + 2 * BORDER)
        first = torch.floor(cells(middle, pixels, size) - span) - 1
        first = first.clamp(min=-BORDER, max=size + BORDER - cell_count)
        taps = first[..., None] + torch.arange(cell_count, device=coarse.device, dtype=coarse.dtype)
        position = cells(window, pixels[..., None], size)
        weights = cubic(position[..., None] - taps[:, :, None, :])
        near = offsets.abs() * (self.coarse / self.reach) <= pixels[..., None]
        counts = (window >= 0) & (window < pixels[..., None]) & near
        return window, (first + BORDER).to(torch.int64), weights, torch.where(counts, 0.0, NOWHERE)


def cubic_weights(pixels: Tensor, target: Tensor, source: int) -> Tensor:
    """Weights of PyTorch's bicubic resize (align_corners=False) along one axis.

    Args:
        pixels: [N, Q], output pixels to evaluate.
        target: [N, 1], output size in pixels.
        source: input size in pixels.

    Returns:
        [N, Q, source + 4], weights of the input extended by `BORDER` repeated pixels on both sides.
    """
    taps = torch.arange(-BORDER, source + BORDER, device=pixels.device, dtype=pixels.dtype)
    return cubic(cells(pixels, target, source)[..., None] - taps)


def cells(pixels: Tensor, target: Tensor, source: int) -> Tensor:
    """Where pixels of a map resized to `target` pixels lie on its `source` cells (align_corners=False)."""
    return (pixels + 0.5) * (source / target) - 0.5


def cubic(distance: Tensor) -> Tensor:
    """PyTorch's bicubic kernel (Keys, a = -0.75), elementwise; 0 from a distance of 2 on.

    Each of its two pieces vanishes with its own clamped argument, so their sum needs no case distinction.
    """
    near = distance.abs()
    far = (near - 1).clamp(min=0, max=1)
    near = near.clamp(max=1)
    rest = 1 - far
    return 1 - near * near * ((CUBIC_A + 3) - (CUBIC_A + 2) * near) + CUBIC_A * far * (rest * rest)
