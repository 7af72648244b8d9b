"""The Temporal Shift Module and its networks, on torch and torchvision only."""
