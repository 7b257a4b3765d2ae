"""The folder where chosen cuts are kept from run to run: one ``megatron-dip/tuned/1`` file for each key.

A file fits a run whose key is equal to its own (:class:`megatron_dip.spec.tuned.RunKey`). ``megatron-dip tune`` writes it, and so does a run that
learned which cut would have been better; ``--dip-partition auto`` reads it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from megatron_dip.iteration.feedback import save_whole
from megatron_dip.spec.codec import decode, read_file
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.tuned import TUNED_FORMAT, RunKey, TunedCut

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MEGATRON_DIP_CACHE"


def default_cache_folder() -> Path:
    """``$MEGATRON_DIP_CACHE``, or megatron-dip in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-dip"


def cut_file(folder: Path, key: RunKey) -> Path:
    return folder / f"cut_{key.digest()}.json"


def find_cut(folder: Path, key: RunKey) -> TunedCut | None:
    """The cut that was chosen for such a run; None where there is none, or its file is of no use (which is said)."""
    file = cut_file(folder, key)
    if not file.is_file():
        return None
    try:
        found = load_tuned(file)
    except InputError as error:
        logger.warning("a kept cut is not taken, and chosen anew: %s", error)
        return None
    return found if found.key == key else None


def load_tuned(file: Path) -> TunedCut:
    """Raises InputError for what is no such file."""
    found = decode(read_file(file), TunedCut, str(file), wanted=TUNED_FORMAT)
    found.validate(str(file))
    return found


def keep_cut(folder: Path, tuned: TunedCut) -> Path:
    """Writes a cut's file, in place of an earlier one; what cannot be written is said and ends nothing."""
    file = cut_file(folder, tuned.key)
    save_whole(file, tuned)
    return file
