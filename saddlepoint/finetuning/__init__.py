"""A user's own examples: read and checked, trained on, and what that did to safety. Nothing here is imported until it is asked for."""
