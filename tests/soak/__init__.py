"""What takes too long for every change: `make soak`, ten minutes of kills, bit flips, random sequences and threads."""
