"""The mask head on fixed shapes: box-local probabilities of each detection's own class."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from norton_deploy.errors import UserError


class StaticMaskHead(nn.Module):
    """Mask head and predictor; the last 1x1 convolution is evaluated for the detected class only.

    torchvision computes a mask for every class and then picks one. With 91 classes that is 90 masks too many,
    so each RoI here gathers its class's row of the last layer instead. Probabilities are pasted into the image
    on the host (`norton_deploy.inference.static_graph`).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, roi_heads: RoIHeads) -> None:
        """
        Args:
            roi_heads: supplies the mask head and predictor.

        Raises:
            UserError: the predictor does not end with a 1x1 convolution.
        """
        super().__init__()
        *body, last = roi_heads.mask_predictor.children()
        if not isinstance(last, nn.Conv2d) or last.kernel_size != (1, 1) or last.groups != 1:
            raise UserError(
                "mask predictor: expected a 1x1 convolution as its last layer (torchvision's MaskRCNNPredictor), "
                f"found {type(last).__name__}"
            )
        self.head = roi_heads.mask_head
        self.body = nn.Sequential(*body)
        bias = torch.zeros(last.out_channels) if last.bias is None else last.bias
        self.register_buffer("weight", last.weight.detach().flatten(1).clone(), persistent=False)
        self.register_buffer("bias", bias.detach().clone(), persistent=False)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            pooled: [N, P_h, P_w, C].
            labels: int64 [N], model labels.

        Returns:
            float32 [N, M, M], probability of each pixel of the box.
        """
        features = self.body(self.head(pooled.permute(0, 3, 1, 2))).to(torch.float32)
        count, channels, height, width = features.shape
        weight = self.weight.index_select(0, labels)
        logits = torch.bmm(weight[:, None], features.reshape(count, channels, height * width))
        logits = logits + self.bias.index_select(0, labels)[:, None, None]
        return torch.sigmoid(logits).reshape(count, height, width)
