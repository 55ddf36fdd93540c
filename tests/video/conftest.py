"""The graphs that find a bright rectangle, as in tests/inference."""

from tests.inference.conftest import graph, lamp

__all__ = ["graph", "lamp"]
