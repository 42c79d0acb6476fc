"""The names and shapes of older libraries, for code that was written for them."""

from . import jpeg2dct as jpeg2dct
from . import svcca as svcca

__all__ = ["jpeg2dct", "svcca"]
