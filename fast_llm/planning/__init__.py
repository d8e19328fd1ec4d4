"""What is known before training: checks, memory, time, and the fastest layout. No torch."""
