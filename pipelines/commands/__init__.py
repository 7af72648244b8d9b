"""The subcommands of prepare.py: their arguments, and what they print."""
