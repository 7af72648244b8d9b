"""Former name of pipelines.loading.dali_loader, for programs that import it from outside."""

from pipelines.loading.dali_loader import DaliLoader

__all__ = ["DaliLoader"]
