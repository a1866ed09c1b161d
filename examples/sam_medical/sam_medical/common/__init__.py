"""What every part uses: errors for the user, files written whole, locks, signals, paths and plain values."""
