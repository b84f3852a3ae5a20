"""Base models made from packages that ``pip`` brings anywhere: each converted once, into this user's cache."""

from __future__ import annotations

from coremerge.bases.make import CONVERTERS, make

__all__ = ["CONVERTERS", "make"]
