"""GPUs of the machine that plans, which must not initialise CUDA: what it forks could not use it."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.sweep.forks import ask

DEVICES = Path("/dev")  # has a file for each GPU, nvidia0 and on


def visible() -> list[str]:
    """GPUs that runs may use, asked of nvidia-smi; a container may have GPUs without it."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        return [device for device in devices.split(",") if device.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
        found = [line for line in listed.splitlines() if line.startswith("GPU ")]
    except OSError:
        found = [str(file) for file in DEVICES.glob("nvidia[0-9]*")]
    return [str(index) for index in range(len(found))]


def lacking(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why runs that ask for a GPU cannot be on this machine. Torch is asked, in another process: one for CPUs sees none
    that is there, and one for ROCm those of which nvidia-smi knows nothing.
    """
    wide = max((config["processes"] for config in configs if config["device"] == "cuda"), default=0)
    if not wide or (seen := ask("torch.cuda", "device_count")) >= wide:
        return []
    many = "1 GPU" if wide == 1 else f"{wide} GPUs"
    return [f"device=cuda must have {many} that torch sees here, found {seen}; use device=cpu, or another machine"]
