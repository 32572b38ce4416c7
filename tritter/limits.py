"""Upper limits on the sizes of models and runs, and parsing of counts (7B, 350M, 7e9, 5GB).

The limits exceed every real model and still fit on one machine. All sizes (of a config.json, a
run, an expansion or a plan) are compared with them before anything is counted or built. This
module imports nothing slow, so invalid arguments fail fast.
"""

import re
from decimal import Decimal

MAX_LAYERS = 10**4
MAX_WIDTH = 2**20  # of the hidden size, of an FFN, of all heads together
MAX_EXPERTS = 4096  # of a layer
MAX_VOCABULARY = 2**24
MAX_PARAMETERS = 10**14
MAX_TENSORS = 2**18  # on disk: 10⁴ layers of 4096 experts each would be 10⁸ names
MAX_LABELS = 2**16  # transformers writes a name for each
MAX_POSITIONS = 2**31 - 1
MAX_COUNT = 10**9  # of everything without a limit of its own: steps, tokens, documents
MAX_SEED = 2**32 - 1
MAX_BYTES = 10**15  # of one file of tensors

NO_EPOCHS = "epochs are not supported: set training.max_tokens or training.max_steps"
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", start=1)},
}
_NUMBER = re.compile(
    r"([0-9][0-9_]{0,30}(?:\.[0-9]{1,30})?(?:e[0-9]{1,2})?)\s*([a-z]*)", re.IGNORECASE
)


def parse_count(text: str, *, is_bytes: bool = False) -> int | None:
    """Return the integer behind a number with a unit, or None if it is not a positive count.

    Args:
        text: such as `7B` or `5GB`.
        is_bytes: the number has a unit of bytes, such as GB or GiB.
    """
    units = _BYTE_UNITS if is_bytes else _COUNT_UNITS
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        return None
    value = int(Decimal(match[1]) * units[match[2].lower()])
    return value if value >= 1 else None
