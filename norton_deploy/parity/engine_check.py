"""An engine runs and is compared right after it was built, where this machine's GPU can; otherwise that is said."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import (
    CPU_ENGINE,
    NOT_RUN,
    PORTABLE,
    EngineBuild,
    EngineManifest,
    local_capability,
    manifest_path,
)
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.parity.verification import ReferenceFile, reference_path, verify


def check_engine(
    build: EngineBuild, *, load: Callable[[Path], Predictor] = load_predictor, report: Callable[[str], None] = print
) -> EngineBuild:
    """Put the graph's references beside the engine, run it on them if it can run here, and note that in its manifest.

    Args:
        build: of a checked graph; one that was not built is returned as it is.

    Raises:
        UserError: the engine differs; it then stays as *.unchecked.engine (or .pt2), without a manifest.
    """
    if build.manifest is None:
        return build
    source, beside = reference_path(build.graph), reference_path(build.file)
    if source.is_file() and source != beside:
        shutil.copyfile(source, beside)
    reason = why_not_run(build.manifest, beside)
    if reason:
        return _noted(build, f"{NOT_RUN}: {reason}")
    try:
        predictor = load(build.file)
    except UserError as error:
        return _noted(build, f"{NOT_RUN}: {error}")
    found = verify(predictor, ReferenceFile.load(beside))
    report(f"{build.file} on {predictor.device}\n{found.table()}")
    if not found.passed:
        os.replace(build.file, build.file.with_suffix(f".unchecked{build.file.suffix}"))
        manifest_path(build.file).unlink()
        found.require()
    return _noted(build, f"equal to eager mode on {found.images} images ({found.detections} detections)")


def why_not_run(manifest: EngineManifest, references: Path) -> str:
    """What keeps an engine from being compared on this machine, "" if nothing does."""
    here = local_capability()
    if not references.is_file():
        return "there are no reference detections beside the graph"
    if manifest.compute_capability == CPU_ENGINE:
        return ""
    if here is None:
        return "no GPU here; run norton verify_engine on the target"
    if manifest.compute_capability not in (PORTABLE, here):
        return f"this GPU is of compute capability {here}; run norton verify_engine on the target"
    return ""


def _noted(build: EngineBuild, checked: str) -> EngineBuild:
    manifest = replace(cast(EngineManifest, build.manifest), checked=checked)
    manifest.write(build.file)
    return replace(build, manifest=manifest)
