"""The idea itself: relevance from the output back to the input, one layer at a time."""
