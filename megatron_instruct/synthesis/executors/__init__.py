"""Who runs the workers: this process, several processes of this machine, or Ray's actors on many machines."""
