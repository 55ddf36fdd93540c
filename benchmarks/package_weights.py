"""Put a trained, compressed mask or keypoint detector into the package, in float16 (norton_deploy/weights/)."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.config import parse_settings
from norton_deploy.data.synthetic_coco import CATEGORIES
from norton_deploy.errors import UserError
from norton_deploy.weights import LARGEST_MB, packaged_path


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/package_weights.py."""

    model: Path
    """Detector compressed by fast.yaml and trained on the embedded data (.safetensors)."""


def main() -> int:
    """Check the detector and write it."""
    settings = parse_settings(Settings, prog="package_weights", description=__doc__ or "")
    loaded = load_checkpoint(settings.model)
    header = loaded.header
    if header.task not in ("mask", "keypoint") or header.plan is None:
        raise UserError(f"{settings.model}: expected a compressed mask or keypoint detector")
    drawn = {category["name"] for category in CATEGORIES}
    if not set(header.categories.names) <= drawn:
        raise UserError(f"{settings.model}: its categories are not those of the drawn scenes")
    size_mb = 2 * sum(tensor.numel() for tensor in loaded.model.state_dict().values()) / 1e6
    if size_mb > LARGEST_MB:
        raise UserError(
            f"{settings.model}: {size_mb:.1f} MB in float16, at most {LARGEST_MB:g} MB belong in the package"
        )
    out = packaged_path(header.task)  # type: ignore[arg-type]  # mask or keypoint, checked above
    command = shlex.join(["benchmarks/package_weights.py", *sys.argv[1:]])
    save_checkpoint(out, loaded.model, header.made_by(command, settings.model), half=True)
    print(f"{out.name}: {out.stat().st_size / 1e6:.1f} MB; check it with tools/eval_det.py, float16 rounds the weights")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
