"""Methods: the registry, and the parts that its entries are made of, a concept a file."""

from dgs.model.methods.registry import METHODS, get_method

__all__ = ["METHODS", "get_method"]
