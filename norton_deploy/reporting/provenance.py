"""Where a figure comes from: the machine, the versions, the command and the date."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from norton_deploy.reporting.report import Table

PACKAGES = ("norton-deploy", "torch", "torchvision", "onnx", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "numpy")


def provenance() -> dict[str, Any]:
    """Command line, commit, date (UTC), machine (CPU model, cores, threads, GPU) and package versions, for a result
    file."""
    return {
        "command": shlex.join([_script(), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | _versions(),
    }


def machine_values(values: dict[str, Any]) -> dict[str, Any]:
    """Of what `provenance()` recorded, all that times of layers depend on."""
    machine = values["machine"]
    return {"cpu": machine["cpu"], "threads": machine["torch_threads"], **values["versions"]}


def provenance_table(values: dict[str, Any]) -> Table:
    """What `provenance()` recorded, one entry a row."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {name}".strip(), str(entry)) for name, entry in entries]
    return Table(("What", "Value"), tuple(rows), "Machine and versions")


def _commit() -> str | None:
    """Of the source tree that this package runs from, "-dirty" if it was changed since; None for an installed one."""
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _script() -> str:
    """The program, relative to the folder that it was started in; its name alone if it lies elsewhere."""
    program = Path(sys.argv[0])
    here = Path.cwd()
    return str(program.absolute().relative_to(here) if program.absolute().is_relative_to(here) else program.name)


def _cpu_model() -> str:
    """Model name of the processor as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
