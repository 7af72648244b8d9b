"""From a manifest row to a batch of clips. Takes rank and world size as integers; imports runtime and no other folder."""
