"""What a low-bit number is: grids, their fitting to weights, and how codes lie in memory."""
