"""Export of a trained network to files for other runtimes, each checked against PyTorch before it is kept."""
