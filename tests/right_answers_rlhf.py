"""Right answers to the exercises of lessons 06, 06a and 06b, written in another way than the solutions."""

ANOTHER_WAY = {}
