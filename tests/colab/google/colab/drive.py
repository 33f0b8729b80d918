"""A stand-in for Google Drive: a folder that outlives the runtime, `S6_DRIVE`, appears at the mount point."""

import os
from pathlib import Path


def mount(mountpoint):
    if not os.path.ismount(mountpoint) and not Path(mountpoint).is_symlink():
        Path(mountpoint).symlink_to(os.environ["S6_DRIVE"])
    print(f"Mounted at {mountpoint}")
