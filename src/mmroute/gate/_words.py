"""How a draft is asked for a rating and what it then writes; known to trainers and to gateways that have no torch."""

__all__ = ["LEVELS", "PREFIX", "SWITCH"]

LEVELS = 10
"""One digit each."""
PREFIX = "<rate>"
"""What a prompt that asks for a rating ends in."""
SWITCH = "mmroute_rating"
"""The chat template's variable that puts it there."""
