"""What every room stands on: errors, files, locks, processes, devices, words; no audio, no text."""
