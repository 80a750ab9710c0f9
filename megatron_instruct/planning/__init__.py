"""What a training run would need and take on a cluster, and which layouts are best for it: arithmetic, not measurements."""
