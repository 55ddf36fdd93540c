"""Fitting an image into a graph's fixed input size and mapping the results back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError

# The mean colour that torchvision's detectors subtract (ImageNet's), so that the padding is close to zero
# after normalisation, as torchvision's own padding is.
PADDING_COLOUR = (124, 116, 104)


@dataclass(frozen=True)
class Letterbox:
    """How an image lies inside a canvas: scaled with its aspect ratio kept, in the top left corner.

    Top left, because torchvision pads on the right and at the bottom too.

    Attributes:
        image_size: (height, width) of the image in pixels.
        content_size: (height, width) of the scaled image inside the canvas.
        canvas_size: (height, width) of the canvas.
    """

    image_size: tuple[int, int]
    content_size: tuple[int, int]
    canvas_size: tuple[int, int]

    @classmethod
    def fit(cls, image_size: tuple[int, int], canvas_size: tuple[int, int]) -> Letterbox:
        """The largest scaling of an image that fits the canvas; no side becomes smaller than one pixel.

        Raises:
            UserError: a side of the image is zero.
        """
        if min(image_size) < 1:
            raise UserError(f"image of {image_size[0]}x{image_size[1]} pixels is empty; give a real image")
        scale = min(canvas_size[0] / image_size[0], canvas_size[1] / image_size[1])
        height, width = (
            min(max(round(side * scale), 1), limit) for side, limit in zip(image_size, canvas_size, strict=True)
        )
        return cls(image_size, (height, width), canvas_size)

    @property
    def factors(self) -> tuple[float, float]:
        """(x, y): image pixels per canvas pixel; they differ by the rounding of `content_size` only."""
        return self.image_size[1] / self.content_size[1], self.image_size[0] / self.content_size[0]

    def place(self, image: npt.NDArray[np.uint8], canvas: npt.NDArray[np.uint8]) -> None:
        """Scale `image` [H, W, 3] bilinearly into `canvas` [Hc, Wc, 3] (written in place); pad the rest."""
        height, width = self.content_size
        if self.image_size == self.content_size:
            canvas[:height, :width] = image
        else:
            canvas[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas[height:, :] = PADDING_COLOUR
        canvas[:height, width:] = PADDING_COLOUR

    def boxes_to_image(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Boxes [N, 4] xyxy in canvas pixels -> image pixels, not clipped."""
        x_factor, y_factor = self.factors
        return (boxes * np.array([x_factor, y_factor, x_factor, y_factor], np.float32)).astype(np.float32)

    def keypoints_to_image(self, keypoints: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Keypoints [N, K, 3] (x, y in canvas pixels, score) -> image pixels, scores unchanged."""
        return (keypoints * np.array([*self.factors, 1.0], np.float32)).astype(np.float32)


def place_images(images: Sequence[npt.NDArray[np.uint8]], canvases: npt.NDArray[np.uint8]) -> list[Letterbox]:
    """Scale each image [H, W, 3] into its canvas of [B, Hc, Wc, 3] (written in place); further canvases become blank.

    Returns:
        How each image lies in its canvas.
    """
    canvas_size = (canvases.shape[1], canvases.shape[2])
    letterboxes = [Letterbox.fit((image.shape[0], image.shape[1]), canvas_size) for image in images]
    for letterbox, image, canvas in zip(letterboxes, images, canvases, strict=False):
        letterbox.place(image, canvas)
    canvases[len(images) :] = PADDING_COLOUR
    return letterboxes


def letterboxed(images: Sequence[npt.NDArray[np.uint8]], canvas_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Images [H, W, 3] of any sizes -> canvases [B, Hc, Wc, 3]."""
    canvases = np.empty((len(images), *canvas_size, 3), np.uint8)
    place_images(images, canvases)
    return canvases


def clip_boxes(boxes: npt.NDArray[np.float32], image_size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Boxes [N, 4] xyxy cut off at the borders of an image of (height, width) pixels."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)
