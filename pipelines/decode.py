"""Former name of pipelines.decoding.decode, for programs that import it from outside."""

from pipelines.decoding.decode import decode_clip

__all__ = ["decode_clip"]
