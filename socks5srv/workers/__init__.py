"""Several processes that serve, and the one that starts, restarts and stops them."""
