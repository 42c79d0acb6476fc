"""fourfold in torchmetrics: ``ff.metrics.CCAMetric``. Needs torchmetrics, which is only imported where the class is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._cca_metric import CCAMetric

__all__ = ["CCAMetric"]


def __getattr__(name: str) -> Any:
    if name != "CCAMetric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._cca_metric import CCAMetric
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("torchmetrics"):
            raise
        raise ImportError("fourfold.metrics.CCAMetric needs torchmetrics; run: pip install torchmetrics") from error
    globals()[name] = CCAMetric
    return CCAMetric


def __dir__() -> list[str]:
    return __all__
