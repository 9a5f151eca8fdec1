"""The forward pass and the walk as flat programs of plain operations."""
