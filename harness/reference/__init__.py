"""What is right, in float64 and without PEFT: the closed form; every run holds PEFT's own merge against it."""
