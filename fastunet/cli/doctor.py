"""`fastunet doctor`."""

from __future__ import annotations

import platform

from fastunet import __version__

from .shared import console


def doctor() -> None:
    """Print versions and devices, and which implementation each op gets on each device, and why."""
    import torch

    from fastunet import dispatch
    from fastunet.doctor import device_table, op_table, package_table

    console.print(f"fastunet {__version__}, Python {platform.python_version()}, {platform.platform()}", soft_wrap=True)
    console.print(package_table())
    console.print(device_table())
    backend = dispatch.selected_backend()
    console.print(f"backend: {backend} (FASTUNET_BACKEND or fastunet.backend changes it)", soft_wrap=True)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        console.print(op_table(device))
