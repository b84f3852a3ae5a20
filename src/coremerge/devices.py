"""Where linear algebra and models run: a device that cannot compute is refused before it is given work."""

from __future__ import annotations

import torch

from coremerge.errors import ConfigError


def check_device(device: str, dtype: torch.dtype = torch.float64) -> None:
    """Refuse a device that does not hold, or does not give back, a number of ``dtype``.

    Raises:
        ConfigError: it is unknown, is not there, lacks the dtype, or holds no numbers at all (``meta``).
    """
    if device == "cpu":
        return
    try:
        (torch.ones(2, 2, dtype=dtype, device=device) @ torch.ones(2, 1, dtype=dtype, device=device)).cpu()
    except Exception as error:  # a backend that is not there raises whatever it likes, import errors among it
        first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ConfigError(f"cannot be used: {first}", key="device", value=device, remedy="Use --device cpu") from None
