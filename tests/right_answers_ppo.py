"""Right answers to the exercises of lessons 05a, 05b and 05d, written in another way than the solutions."""

ANOTHER_WAY = {}
