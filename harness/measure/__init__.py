"""What really happened: effective weights, their comparison with B @ A, tolerances, scaling laws."""
