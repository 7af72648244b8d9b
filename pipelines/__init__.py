"""From a manifest row to a batch of clips. Imports nothing of the other folders and is told rank and size as integers."""
