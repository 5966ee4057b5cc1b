"""Saddlepoint: find how a language model breaks its policy, harden it, and prove that the fix holds."""

__version__ = "0.1.0"
