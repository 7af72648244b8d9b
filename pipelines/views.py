"""Former name of pipelines.stream.eval_views, for programs that import it from outside."""

from pipelines.stream.eval_views import EvalProtocol as Protocol

__all__ = ["Protocol"]
