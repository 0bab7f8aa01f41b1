"""What ablated edges carry: another run, zero, means, or constants that were fitted."""
