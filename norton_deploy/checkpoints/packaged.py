"""Small trained detectors that come with the package: NORTON by fast.yaml, on the embedded data, in float16.

They know the categories of the drawn scenes only and are there to show something without any training.
benchmarks/package_weights.py puts a checkpoint here.
"""

from pathlib import Path
from typing import Literal, get_args

from norton_deploy.errors import UserError

PackagedTask = Literal["mask", "keypoint"]
PACKAGED_TASKS: tuple[PackagedTask, ...] = get_args(PackagedTask)
LARGEST_MB = 12.0
"""No file here may be larger, in millions of bytes."""


def packaged_path(task: PackagedTask) -> Path:
    """Where the packaged detector of a task lies, whether it is there or not."""
    return Path(__file__).with_name(f"fast_{task}.safetensors")


def packaged_detector(task: PackagedTask) -> Path:
    """The checkpoint of the packaged detector of a task.

    Raises:
        UserError: this installation has none.
    """
    path = packaged_path(task)
    if not path.is_file():
        raise UserError(
            f"{path.name}: this installation has no packaged {task} detector; give --model FILE, "
            "for example one that `make demo` trains"
        )
    return path
