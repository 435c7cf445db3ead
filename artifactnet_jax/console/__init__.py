"""What the commands share: inputs, the detector asked for, writers of rows, progress."""
