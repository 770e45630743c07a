"""Whether there is room for pictures where a logger writes."""

import errno
import os
import shutil
from typing import Any

__all__ = ["check_room"]

# The most that the pictures and histograms of a cell take in a measurement, and what is left to the rest of the run.
_BYTES_PER_CELL, _MIN_FREE = 200_000, 64_000_000


def check_room(logger: Any, num_cells: int) -> None:
    """Raise unless a measurement's pictures fit on the disk, and in half of the largest file that may be written.

    TensorBoard writes in a thread of its own. An error there is raised in whatever the user logs next, so that it must
    not happen.

    Args:
        logger: the logger. One without a local folder, ``log_dir``, is not checked.
        num_cells: the number of cells that it gets pictures of.

    Raises:
        OSError: if there is no room.
    """
    folder, needed = getattr(logger, "log_dir", None), num_cells * _BYTES_PER_CELL
    if not isinstance(folder, str) or not os.path.isdir(folder):
        return
    if shutil.disk_usage(folder).free < needed + _MIN_FREE:
        raise OSError(errno.ENOSPC, "the disk is nearly full", folder)
    limit = _max_file_size()
    if limit is not None:
        logger.experiment.flush()
        if max((entry.stat().st_size for entry in os.scandir(folder)), default=0) + needed > limit / 2:
            raise OSError(errno.EFBIG, "the limit on the size of a file is near", folder)


def _max_file_size() -> int | None:
    """Return the limit on the size of a file that this process writes; None if there is none."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
