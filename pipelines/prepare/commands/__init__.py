"""The sub-commands of prepare.py."""
