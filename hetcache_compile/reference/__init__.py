"""A small trained WanVACE in the box."""
NUM_FRAMES, MAX_TEXT_LENGTH = 17, 16
