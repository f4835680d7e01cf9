"""The bottom floor: what a check says (verdict, code) and what is said of a file (record), in everyone's words."""
