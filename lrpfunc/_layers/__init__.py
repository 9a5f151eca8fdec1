"""What an operation is, and which operations are one layer."""
