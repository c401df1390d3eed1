"""The backend of `torch.compile`: finds the ops in a graph and puts them in."""
