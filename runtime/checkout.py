"""The root of this checkout: the project runs from it and is never installed."""

from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
